// Digests of sets of block hashes in tiers: radix.digest.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

#include "changes.hpp"

namespace radix {

using Digest = std::array<uint64_t, 2>;

constexpr uint64_t TIER_SALTS[TIERS] = {0, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB};

inline uint64_t digest_mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

// Put hashes in, or take them out.
inline void count_digest(Digest &digest, const uint64_t *hashes, size_t count, int tier, bool add) {
    const uint64_t salt = TIER_SALTS[tier], sign = add ? 1 : -1;
    uint64_t low = 0, high = 0;
    for (size_t i = 0; i < count; i++) {
        low += digest_mix((hashes[i] ^ salt) + 0x9E3779B97F4A7C15u);
        high += digest_mix((hashes[i] ^ salt) + 0xD1B54A32D192ED03u);
    }
    digest[0] += sign * low;
    digest[1] += sign * high;
}

}  // namespace radix
