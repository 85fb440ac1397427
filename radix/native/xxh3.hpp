// XXH3-64 (Yann Collet, xxhash 0.8, BSD-2: github.com/Cyan4973/xxHash) with seed 0, of inputs of more than 240 bytes that
// are a multiple of 64: taken while they are copied, in one pass over memory instead of two, or alone. A copy goes around
// the caches where it can (AVX2): what is written is not read first, and that is a third of a copy's traffic.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define RADIX_XXH3_AVX2 1
#include <immintrin.h>
#endif

namespace radix::xxh3 {

constexpr size_t STRIPE = 64, STRIPES_IN_ROUND = 16, LEAST_BYTES = 256;
constexpr uint32_t PRIME32_1 = 0x9E3779B1u;

alignas(64) inline constexpr uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

inline constexpr uint64_t START[8] = {
    0xC2B2AE3Du,         0x9E3779B185EBCA87u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u,
    0x85EBCA77C2B2AE63u, 0x85EBCA77u,         0x27D4EB2F165667C5u, 0x9E3779B1u,
};
constexpr size_t SCRAMBLE_AT = sizeof SECRET - STRIPE, LAST_AT = SCRAMBLE_AT - 7, MERGE_AT = 11;

inline uint64_t read64(const uint8_t *at) {
    uint64_t value;
    std::memcpy(&value, at, 8);
    return value;
}

inline uint64_t folded_product(uint64_t left, uint64_t right) {
    const auto product = static_cast<unsigned __int128>(left) * right;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t merged(const uint64_t *lanes, uint64_t length) {
    uint64_t hash = length * 0x9E3779B185EBCA87u;
    for (size_t i = 0; i < 4; i++)
        hash += folded_product(lanes[2 * i] ^ read64(SECRET + MERGE_AT + 16 * i),
                               lanes[2 * i + 1] ^ read64(SECRET + MERGE_AT + 8 + 16 * i));
    hash = (hash ^ (hash >> 37)) * 0x165667919E3779F9u;
    return hash ^ (hash >> 32);
}

// The state of one input. `stripes`: its next whole stripes, but not the last of all, copied to `to` unless null;
// `finish`: the last one.
class Portable {
  public:
    Portable() { std::memcpy(lanes_, START, sizeof lanes_); }

    void stripes(const uint8_t *from, size_t count, uint8_t *to) {
        if (to) std::memcpy(to, from, count * STRIPE);
        for (size_t i = 0; i < count; i++) {
            accumulate(from + i * STRIPE, SECRET + 8 * in_round_);
            if (++in_round_ == STRIPES_IN_ROUND) scramble();
        }
    }

    uint64_t finish(const uint8_t *last, uint8_t *to, uint64_t length) {
        if (to) std::memcpy(to, last, STRIPE);
        accumulate(last, SECRET + LAST_AT);
        return merged(lanes_, length);
    }

  private:
    void accumulate(const uint8_t *from, const uint8_t *secret) {
        for (size_t i = 0; i < 8; i++) {
            const uint64_t value = read64(from + 8 * i), keyed = value ^ read64(secret + 8 * i);
            lanes_[i ^ 1] += value;
            lanes_[i] += (keyed & 0xFFFFFFFFu) * (keyed >> 32);
        }
    }
    void scramble() {
        for (size_t i = 0; i < 8; i++)
            lanes_[i] = (lanes_[i] ^ (lanes_[i] >> 47) ^ read64(SECRET + SCRAMBLE_AT + 8 * i)) * PRIME32_1;
        in_round_ = 0;
    }

    uint64_t lanes_[8];
    size_t in_round_ = 0;
};

#ifdef RADIX_XXH3_AVX2

#define RADIX_AVX2 __attribute__((target("avx2")))
constexpr size_t AHEAD_BYTES = 1024;  // asked for early: rounds that are streamed outrun the processor's own guess

// `to` is aligned to 32 bytes. Whoever reads what was copied on another core fences first.
class Avx2 {
  public:
    RADIX_AVX2 Avx2() {
        lanes_[0] = load(START);
        lanes_[1] = load(START + 4);
    }

    RADIX_AVX2 void stripes(const uint8_t *from, size_t count, uint8_t *to) {
        while (count) {
            const size_t now = count < STRIPES_IN_ROUND - in_round_ ? count : STRIPES_IN_ROUND - in_round_;
            if (to) round<true>(from, now, to), to += now * STRIPE;
            else round<false>(from, now, nullptr);
            from += now * STRIPE;
            count -= now;
        }
    }

    RADIX_AVX2 uint64_t finish(const uint8_t *last, uint8_t *to, uint64_t length) {
        if (to) accumulate<true>(lanes_, last, SECRET + LAST_AT, to);
        else accumulate<false>(lanes_, last, SECRET + LAST_AT, nullptr);
        alignas(32) uint64_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), lanes_[0]);
        _mm256_store_si256(reinterpret_cast<__m256i *>(lanes + 4), lanes_[1]);
        return merged(lanes, length);
    }

    RADIX_AVX2 static void copy(const uint8_t *from, size_t count, uint8_t *to) {
        for (size_t at = 0; at < count * STRIPE; at += 32) {
            _mm_prefetch(reinterpret_cast<const char *>(from + at + AHEAD_BYTES), _MM_HINT_NTA);
            _mm256_stream_si256(reinterpret_cast<__m256i *>(to + at), load(from + at));
        }
    }

  private:
    RADIX_AVX2 static __m256i load(const void *at) { return _mm256_loadu_si256(static_cast<const __m256i *>(at)); }

    template <bool COPY>
    RADIX_AVX2 void round(const uint8_t *from, size_t count, uint8_t *to) {
        __m256i lanes[2] = {lanes_[0], lanes_[1]};
        const uint8_t *secret = SECRET + 8 * in_round_;
        for (size_t i = 0; i < count; i++) {
            // What is copied is not read again soon; what is only digested is about to be sent, or was just received.
            _mm_prefetch(reinterpret_cast<const char *>(from + AHEAD_BYTES), COPY ? _MM_HINT_NTA : _MM_HINT_T0);
            accumulate<COPY>(lanes, from, secret, to);
            from += STRIPE;
            secret += 8;
            if (COPY) to += STRIPE;
        }
        in_round_ += count;
        if (in_round_ == STRIPES_IN_ROUND) {
            scramble(lanes);
            in_round_ = 0;
        }
        lanes_[0] = lanes[0];
        lanes_[1] = lanes[1];
    }

    template <bool COPY>
    RADIX_AVX2 static inline void accumulate(__m256i *lanes, const uint8_t *from, const uint8_t *secret, uint8_t *to) {
        for (int half = 0; half < 2; half++) {
            const __m256i value = load(from + 32 * half);
            if (COPY) _mm256_stream_si256(reinterpret_cast<__m256i *>(to + 32 * half), value);
            const __m256i keyed = _mm256_xor_si256(value, load(secret + 32 * half));
            const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
            const __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
            lanes[half] = _mm256_add_epi64(_mm256_add_epi64(lanes[half], swapped), product);
        }
    }

    RADIX_AVX2 static inline void scramble(__m256i *lanes) {
        const __m256i prime = _mm256_set1_epi32(static_cast<int>(PRIME32_1));
        for (int half = 0; half < 2; half++) {
            __m256i value = _mm256_xor_si256(lanes[half], _mm256_srli_epi64(lanes[half], 47));
            value = _mm256_xor_si256(value, load(SECRET + SCRAMBLE_AT + 32 * half));
            const __m256i low = _mm256_mul_epu32(value, prime);
            const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(value, 32), prime);
            lanes[half] = _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
        }
    }

    __m256i lanes_[2];
    size_t in_round_ = 0;
};

#endif

}  // namespace radix::xxh3
