// Hash -> small id, where the hashes stand in an array of the caller's: 5 to 7 bytes an entry, one cache line a probe.
//
// 15 slots and two counters make a bucket of one cache line. A slot is an id with bits of its hash in front, as many as
// the ids leave free. An entry that finds its bucket full goes to the next one that is not. Growing and shrinking moves
// one bucket with each insertion or removal: buckets keep the order of the hashes, so what is before the frontier is in
// the new half, what is behind it in the old one, and memory is taken at one end as it is given back at the other.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <utility>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "memory.hpp"

namespace radix {

constexpr uint32_t NONE = 0xffffffff;  // no id

class Table {
  public:
    // Ids are below `capacity`, and a new highest one comes only when all below it are in the table.
    // `seed`: nobody who chooses hashes can choose where they fall.
    Table(const Region<uint64_t> &hashes, size_t capacity, uint64_t seed)
        : hashes_(hashes), seed_(seed), halves_{Half(capacity / 8 + 4096), Half(capacity / 8 + 4096)} {
        now().resize(4, 0);
    }

    uint64_t place(uint64_t hash) const {  // a mix: the whole product, folded
        const auto product = static_cast<unsigned __int128>(hash ^ seed_) * 0x9E3779B97F4A7C15u;
        return (static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64)) * 0xD1B54A32D192ED03u;
    }
    RADIX_INLINE void prefetch(uint64_t place) const {
        const Half &half = half_of(place);
        __builtin_prefetch(&half.buckets[half.home(place)]);
    }
    // An id that may well be the one, or NONE: what to prefetch once the bucket is there.
    uint32_t guess(uint64_t place) const {
        const Half &half = half_of(place);
        const Bucket &bucket = half.buckets[half.home(place)];
        const uint32_t found = half.candidates(bucket, place);
        return found ? bucket.slots[std::countr_zero(found)] & half.id_mask : NONE;
    }
    template <class Is> uint32_t find(uint64_t place, Is is) const {
        const Half &half = half_of(place);
        for (size_t at = half.home(place);; at++) {
            const Bucket &bucket = half.buckets[at];
            for (uint32_t found = half.candidates(bucket, place); found; found &= found - 1)
                if (const uint32_t id = bucket.slots[std::countr_zero(found)] & half.id_mask; is(id)) return id;
            if (!bucket.passed) return NONE;
        }
    }
    uint32_t find(uint64_t place, uint64_t hash) const {
        return find(place, [&](uint32_t id) { return hashes_[id] == hash; });
    }
    void insert(uint64_t place, uint32_t id) {  // an id that is not in it
        highest_ = std::max(highest_, id);
        half_of(place).put(place, id);
        if (++used_ >= now().count * FULL && !moving()) start(round() ? now().count / 2 * 3 : now().count / 3 * 4);
        move_bucket();
    }
    void erase(uint64_t place, uint32_t id) {  // an id that is in it
        half_of(place).take(place, id);
        if (--used_ < now().count * FULL / 2 && now().count > 64 && !moving())
            start(round() ? now().count / 4 * 3 : now().count / 3 * 2);
        move_bucket();
    }
    // See Region: for the next `changes` insertions or removals.
    bool committed(size_t changes) const { return halves_[!now_].buckets.committed(ahead(changes)); }
    void commit(size_t changes) { next().buckets.commit(ahead(changes)); }

    void rename(uint64_t place, uint32_t from, uint32_t to) {
        half_of(place).take(place, from);
        half_of(place).put(place, to);
    }

  private:
    static constexpr int SLOTS = 15, FULL = 13;  // of SLOTS, on average
    static constexpr uint16_t MANY = 0xffff;
    static constexpr size_t SPILL = 64;  // buckets: further than that from its home is hardly any entry
    struct Bucket {
        uint32_t slots[SLOTS];
        uint16_t used;
        uint16_t passed;  // entries that found it full and are further on; MANY: as many or more

        void pass(int by) {
            if (passed != MANY) passed = static_cast<uint16_t>(passed + by);
        }
    };
    struct Half {
        Region<Bucket> buckets;
        uint64_t count = 0;    // homes; entries may go on into buckets behind them
        uint32_t id_mask = 0;

        explicit Half(size_t capacity) : buckets(capacity) {}
        void resize(uint64_t homes, uint32_t highest) {
            count = homes;
            id_mask = (1u << std::bit_width(std::max<uint64_t>(std::min<uint64_t>(homes * 2 * SLOTS, 1 << 30), highest))) - 1;
        }
        size_t home(uint64_t place) const { return (place >> 32) * count >> 32; }
        uint32_t slot(uint64_t place, uint32_t id) const { return (static_cast<uint32_t>(place) & ~id_mask) | id; }
        uint32_t candidates(const Bucket &bucket, uint64_t place) const {  // a bit for each slot with such bits in front
            uint32_t found = 0;
#if defined(__SSE2__)
            const __m128i front = _mm_set1_epi32(static_cast<int>(slot(place, 0)));
            const __m128i mask = _mm_set1_epi32(static_cast<int>(~id_mask));
            for (int i = 0; i < 4; i++) {
                const __m128i slots = _mm_load_si128(reinterpret_cast<const __m128i *>(&bucket) + i);
                const __m128i equal = _mm_cmpeq_epi32(_mm_and_si128(slots, mask), front);
                found |= static_cast<uint32_t>(_mm_movemask_ps(_mm_castsi128_ps(equal))) << 4 * i;
            }
#else
            for (int i = 0; i < SLOTS; i++) found |= uint32_t((bucket.slots[i] & ~id_mask) == slot(place, 0)) << i;
#endif
            return found & ((1u << bucket.used) - 1);
        }
        void put(uint64_t place, uint32_t id) {
            size_t at = home(place);
            for (; buckets[at].used == SLOTS; at++) buckets[at].pass(1);
            buckets[at].slots[buckets[at].used++] = slot(place, id);
        }
        void take(uint64_t place, uint32_t id) {
            for (size_t at = home(place);; at++) {
                Bucket &bucket = buckets[at];
                for (uint32_t found = candidates(bucket, place); found; found &= found - 1)
                    if (uint32_t &entry = bucket.slots[std::countr_zero(found)]; entry == slot(place, id)) {
                        entry = bucket.slots[--bucket.used];
                        return;
                    }
                bucket.pass(-1);
            }
        }
    };

    Half &now() { return halves_[now_]; }
    Half &next() { return halves_[!now_]; }
    bool moving() const { return halves_[!now_].count; }
    const Half &half_of(uint64_t place) const {
        const Half &half = halves_[now_];
        return moving() && half.home(place) < frontier_ ? halves_[!now_] : half;
    }
    Half &half_of(uint64_t place) { return const_cast<Half &>(std::as_const(*this).half_of(place)); }

    bool round() const { return std::has_single_bit(halves_[now_].count); }  // sizes: 4, 6, 8, 12, 16, 24 ...
    size_t ahead(size_t changes) const {  // buckets of the next half
        const uint64_t from = halves_[now_].count, to = halves_[!now_].count;
        return moving() ? (frontier_ + changes + 1) * to / from + SPILL : 2 * (changes + 1) + SPILL;
    }
    void start(uint64_t count) {
        next().resize(count, highest_);
        frontier_ = 0;
    }
    void move_bucket() {  // what has its home at the frontier
        if (!moving()) return;
        Half &from = now(), &to = next();
        Bucket &home = from.buckets[frontier_];  // what is left in it has its home here
        for (uint32_t i = 0; i < home.used; i++) {
            const uint32_t id = home.slots[i] & from.id_mask;
            to.put(place(hashes_[id]), id);
        }
        home.used = 0;
        for (size_t at = frontier_ + 1; home.passed; at++)
            for (uint32_t i = from.buckets[at].used; i-- > 0;) {
                const uint32_t id = from.buckets[at].slots[i] & from.id_mask;
                const uint64_t place = this->place(hashes_[id]);
                if (from.home(place) != frontier_) continue;
                from.take(place, id);
                to.put(place, id);
            }
        frontier_++;
        if (frontier_ % PIECE == 0) now().buckets.release(frontier_ - PIECE, frontier_);
        const Bucket &ahead = now().buckets[frontier_ + 4];
        for (uint32_t i = 0; i < ahead.used; i++) __builtin_prefetch(&hashes_[ahead.slots[i] & now().id_mask]);
        __builtin_prefetch(&now().buckets[frontier_ + 8]);
        if (frontier_ < now().count) return;
        now().buckets.release(0, frontier_ + PIECE);
        now().count = 0;
        now_ = !now_;
    }
    static constexpr size_t PIECE = (1 << 15) / RADIX_SHRINK;  // buckets: a huge page

    const Region<uint64_t> &hashes_;
    const uint64_t seed_;
    Half halves_[2];
    bool now_ = false;
    size_t frontier_ = 0;
    uint64_t used_ = 0;
    uint32_t highest_ = 0;
};

}  // namespace radix
