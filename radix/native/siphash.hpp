// Block keys: SipHash-2-4 with 128 bits of output (Aumasson, Bernstein: SipHash, INDOCRYPT 2012), chained.
//
//   key(block) = SipHash-2-4-128(tokens, as little-endian uint32, padded with zeros to 8 bytes | key(block before))
//
// The key of the block before comes last, so that the tokens of the next blocks are absorbed LANES at a time, in vector
// registers, while the scalar units run the one chain that cannot be cut short: three words and the finalization.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace radix {

#define RADIX_INLINE __attribute__((always_inline)) inline

struct SipKey {
    uint64_t low, high;
};

template <class T> RADIX_INLINE T rotate_left(T x, int bits) { return (x << bits) | (x >> (64 - bits)); }

template <class T> struct SipState {  // T: uint64_t, or a vector of them: that many messages at once
    T v0, v1, v2, v3;

    RADIX_INLINE static SipState of(SipKey key, T zero) {
        return {zero + (key.low ^ 0x736f6d6570736575), zero + (key.high ^ 0x646f72616e646f6d ^ 0xee),
                zero + (key.low ^ 0x6c7967656e657261), zero + (key.high ^ 0x7465646279746573)};
    }
    template <int ROUNDS> RADIX_INLINE void rounds() {
        for (int i = 0; i < ROUNDS; i++) {
            v0 += v1; v1 = rotate_left(v1, 13); v1 ^= v0; v0 = rotate_left(v0, 32);
            v2 += v3; v3 = rotate_left(v3, 16); v3 ^= v2;
            v0 += v3; v3 = rotate_left(v3, 21); v3 ^= v0;
            v2 += v1; v1 = rotate_left(v1, 17); v1 ^= v2; v2 = rotate_left(v2, 32);
        }
    }
    RADIX_INLINE void absorb(T word) {
        v3 ^= word;
        rounds<2>();
        v0 ^= word;
    }
    RADIX_INLINE SipKey finish() {
        v2 ^= 0xee;
        rounds<4>();
        const uint64_t low = v0 ^ v1 ^ v2 ^ v3;
        v1 ^= 0xdd;
        rounds<4>();
        return {low, v0 ^ v1 ^ v2 ^ v3};
    }
};

template <int LANES> struct Lanes {
    typedef uint64_t Vector __attribute__((vector_size(8 * LANES)));
};

// Writes two words a block. `parent` is the key before the first block: zeros at the root.
template <int LANES>
RADIX_INLINE void chain_keys(const uint32_t *tokens, size_t blocks, size_t block_size, SipKey key, SipKey parent,
                             uint64_t *out) {
    using Vector = typename Lanes<LANES>::Vector;
    if (!blocks) return;
    const size_t words = (block_size + 1) / 2;
    const uint64_t length_word = uint64_t(8 * words + 16) << 56;
    const auto initial = SipState<Vector>::of(key, Vector{});
    const uint32_t *next[LANES];  // the blocks that are absorbed now
    auto advance = [&](size_t first) {
        for (size_t lane = 0; lane < LANES; lane++)
            next[lane] = tokens + (first + lane < blocks ? first + lane : blocks - 1) * block_size;
    };
    auto gather = [&](size_t word) {
        Vector gathered{};
        const size_t bytes = 2 * word + 1 < block_size ? 8 : 4;
        for (int lane = 0; lane < LANES; lane++) {
            uint64_t value = 0;
            if (bytes == 8) std::memcpy(&value, next[lane] + 2 * word, 8);
            else std::memcpy(&value, next[lane] + 2 * word, 4);
            gathered[lane] = value;
        }
        return gathered;
    };
    auto absorbed = initial;
    advance(0);
    for (size_t word = 0; word < words; word++) absorbed.absorb(gather(word));
    for (size_t first = 0; first < blocks; first += LANES) {
        const auto lanes = absorbed;
        absorbed = initial;
        advance(first + LANES);
        size_t word = 0;
        for (size_t lane = 0; lane < LANES && first + lane < blocks; lane++) {
            for (const size_t end = (lane + 1) * words / LANES; word < end; word++) absorbed.absorb(gather(word));
            SipState<uint64_t> chain{lanes.v0[lane], lanes.v1[lane], lanes.v2[lane], lanes.v3[lane]};
            chain.absorb(parent.low);
            chain.absorb(parent.high);
            chain.absorb(length_word);
            parent = chain.finish();
            if (parent.low == 0) parent.low = 1;  // a block hash of 0 would be the root
            out[2 * (first + lane)] = parent.low;
            out[2 * (first + lane) + 1] = parent.high;
        }
    }
}

}  // namespace radix
