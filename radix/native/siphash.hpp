// Block keys: SipHash-2-4 with 128 bits of output (Aumasson, Bernstein: SipHash, INDOCRYPT 2012), chained.
//
//   key(block) = SipHash-2-4-128(tokens, as little-endian uint32, zero-padded to 8 bytes | key of the block before)
//
// The key of the block before comes last, so that the tokens of the next blocks are absorbed LANES at a time, in vector
// registers, while the scalar units run the one chain that cannot be cut short: three words and the finalization.
#pragma once
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to functions that are all inlined

namespace radix {

static_assert(std::endian::native == std::endian::little, "tokens are hashed as they lie in memory");

#define RADIX_INLINE __attribute__((always_inline))

struct SipKey {
    uint64_t low, high;
};

template <class T> RADIX_INLINE inline T rotate_left(const T &x, int bits) { return (x << bits) | (x >> (64 - bits)); }

template <class T> struct SipState {  // T: uint64_t, or a vector of them: that many messages at once
    T v0, v1, v2, v3;

    RADIX_INLINE static SipState of(SipKey key) {
        const T zero{};
        return {zero + (key.low ^ 0x736f6d6570736575), zero + (key.high ^ 0x646f72616e646f6d ^ 0xee),
                zero + (key.low ^ 0x6c7967656e657261), zero + (key.high ^ 0x7465646279746573)};
    }
    RADIX_INLINE void round_before_v3() { v0 += v1; v1 = rotate_left(v1, 13); v1 ^= v0; v0 = rotate_left(v0, 32); }
    RADIX_INLINE void round_from_v3() {
        v2 += v3; v3 = rotate_left(v3, 16); v3 ^= v2;
        v0 += v3; v3 = rotate_left(v3, 21); v3 ^= v0;
        v2 += v1; v1 = rotate_left(v1, 17); v1 ^= v2; v2 = rotate_left(v2, 32);
    }
    RADIX_INLINE void round() { round_before_v3(); round_from_v3(); }
    RADIX_INLINE void absorb(const T &word) {
        v3 ^= word;
        round(); round();
        v0 ^= word;
    }
    RADIX_INLINE SipKey finish() {
        v2 ^= 0xee;
        round(); round(); round(); round();
        const uint64_t low = v0 ^ v1 ^ v2 ^ v3;
        v1 ^= 0xdd;
        round(); round(); round(); round();
        return {low, v0 ^ v1 ^ v2 ^ v3};
    }
};

template <size_t LANES> struct Lanes {
    typedef uint64_t Vector __attribute__((vector_size(8 * LANES)));
};

// Writes two words a block. `parent` is the key before the first block: zeros at the root. A BLOCK_SIZE other than 0
// is `block_size`, known to the compiler.
template <size_t LANES, size_t BLOCK_SIZE>
RADIX_INLINE inline void chain_keys(const uint32_t *tokens, size_t blocks, size_t block_size, SipKey key, SipKey parent,
                                    uint64_t *out) {
    using Vector = typename Lanes<LANES>::Vector;
    if (blocks == 0) return;
    if constexpr (LANES > 1)
        if (blocks < LANES) return chain_keys<LANES / 2, BLOCK_SIZE>(tokens, blocks, block_size, key, parent, out);
    if constexpr (BLOCK_SIZE != 0) block_size = BLOCK_SIZE;
    const size_t words = block_size / 2;  // without the last token of an odd number
    const uint64_t length_word = uint64_t((block_size + 1) / 2 * 8 + 16) << 56;
    const auto initial = SipState<Vector>::of(key);
    auto absorbed = initial;
    alignas(64) uint64_t lanes[4][LANES];

    auto absorb = [&](const uint32_t *first_lane, size_t bytes) RADIX_INLINE {
        Vector gathered{};
        for (size_t lane = 0; lane < LANES; lane++) {
            uint64_t word = 0;
            std::memcpy(&word, first_lane + lane * block_size, bytes);
            gathered[lane] = word;
        }
        absorbed.absorb(gathered);
    };
    auto absorb_words = [&](const uint32_t *block, size_t from, size_t to) RADIX_INLINE {
        for (size_t word = from; word < to; word++) absorb(block + 2 * word, 8);
    };
    auto absorb_odd_token = [&](const uint32_t *block) RADIX_INLINE {
        if (block_size % 2) absorb(block + block_size - 1, 4);
    };
    auto take_lanes = [&]() RADIX_INLINE {
        absorbed.round_before_v3();  // the parent's low half goes into v3: a part of its round can be done before
        std::memcpy(lanes[0], &absorbed.v0, sizeof lanes[0]);
        std::memcpy(lanes[1], &absorbed.v1, sizeof lanes[1]);
        std::memcpy(lanes[2], &absorbed.v2, sizeof lanes[2]);
        std::memcpy(lanes[3], &absorbed.v3, sizeof lanes[3]);
        absorbed = initial;
    };
    auto chain = [&](size_t lane) RADIX_INLINE {
        SipState<uint64_t> state{lanes[0][lane], lanes[1][lane], lanes[2][lane], lanes[3][lane]};
        state.v3 ^= parent.low;
        state.round_from_v3();
        state.round();
        state.v0 ^= parent.low;
        state.absorb(parent.high);
        state.absorb(length_word);
        parent = state.finish();
        if (parent.low == 0) parent.low = 1;  // a block hash of 0 would be the root
        *out++ = parent.low;
        *out++ = parent.high;
    };

    absorb_words(tokens, 0, words);
    absorb_odd_token(tokens);
    size_t first = 0;
    for (; first + LANES <= blocks; first += LANES) {
        take_lanes();
        // The last blocks are absorbed together with some before them, so that all lanes have one.
        const uint32_t *next = tokens + std::min(first + LANES, blocks - LANES) * block_size;
        auto step = [&](size_t lane) RADIX_INLINE {
            absorb_words(next, lane * words / LANES, (lane + 1) * words / LANES);
            chain(lane);
        };
        if constexpr (BLOCK_SIZE != 0)  // unrolling pays where a step's words are known, and costs elsewhere
            [&]<size_t... lane>(std::index_sequence<lane...>) RADIX_INLINE {
                (step(lane), ...);
            }(std::make_index_sequence<LANES>());
        else
            for (size_t lane = 0; lane < LANES; lane++) step(lane);
        absorb_odd_token(next);
    }
    take_lanes();
    for (; first < blocks; first++) chain(LANES - (blocks - first));
}

}  // namespace radix
