// Changes of one worker's blocks, as columns: radix.tree.Changes.
#pragma once
#include <cstdint>
#include <vector>

namespace radix {

enum Kind : uint8_t { STORE = 0, REMOVE = 1, CLEAR = 2 };

constexpr int TIERS = 3;  // device, host, disk

struct Changes {  // change i is about hashes[ends[i - 1]] to hashes[ends[i] - 1]
    std::vector<uint8_t> kinds, tiers;
    std::vector<uint64_t> parents;
    std::vector<uint32_t> ends;
    std::vector<uint64_t> hashes;
};

}  // namespace radix
