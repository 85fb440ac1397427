// Changes of one worker's blocks, as columns: radix.tree.Changes.
#pragma once
#include <cstdint>
#include <span>

namespace radix {

enum Kind : uint8_t { STORE = 0, REMOVE = 1, CLEAR = 2 };

constexpr int TIERS = 3;  // device, host, disk

struct Changes {  // change i is about hashes[ends[i - 1]] to hashes[ends[i] - 1]; whoever makes them keeps the memory
    std::span<const uint8_t> kinds, tiers;
    std::span<const uint64_t> parents;
    std::span<const uint32_t> ends;
    std::span<const uint64_t> hashes;
};

}  // namespace radix
