// What one worker holds, by its own account: radix.held. Simpler than the tree, and nothing of it but the digest, so that
// the two do not go wrong together.
//
// Open addressing with linear probing, at most 3/4 full; hash 0 marks a free slot. Removal closes up what follows.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "digest.hpp"

namespace radix {

class Held {
  public:
    struct Columns {
        std::vector<uint64_t> hashes, parents;
        std::vector<uint8_t> masks;
    };

    explicit Held(uint64_t seed) : seed_(seed) {}

    void store(const uint64_t *hashes, size_t count, uint64_t parent, int tier) {
        reserve(size_ + count);
        prefetch(hashes, count);
        for (size_t i = 0; i < count; parent = hashes[i++]) {
            Entry &entry = slots_[find(hashes[i])];
            if (!entry.hash) {
                entry = {hashes[i], parent, 0};
                size_++;
            }
            if (entry.mask >> tier & 1) continue;
            entry.mask |= static_cast<uint8_t>(1 << tier);
            count_digest(digest_, hashes + i, 1, tier, true);
        }
    }
    void remove(const uint64_t *hashes, size_t count, int tier) {
        if (!size_) return;
        prefetch(hashes, count);
        for (size_t i = 0; i < count; i++) {
            const size_t at = find(hashes[i]);
            if (!slots_[at].hash || !(slots_[at].mask >> tier & 1)) continue;
            slots_[at].mask &= static_cast<uint8_t>(~(1 << tier));
            count_digest(digest_, hashes + i, 1, tier, false);
            if (!slots_[at].mask) erase(at);
        }
    }
    void clear() { *this = Held(seed_); }
    size_t size() const { return size_; }
    const Digest &digest() const { return digest_; }

    // In the order of hashes, but each block after its parent where that is held; parents in a circle do not matter.
    Columns columns() const {
        Columns columns;
        columns.hashes.reserve(size_);
        columns.parents.reserve(size_);
        columns.masks.reserve(size_);
        std::vector<std::pair<uint64_t, size_t>> order;
        order.reserve(size_);
        for (size_t at = 0; at < slots_.size(); at++)
            if (slots_[at].hash) order.emplace_back(slots_[at].hash, at);
        std::sort(order.begin(), order.end());
        std::vector<bool> seen(slots_.size());
        std::vector<size_t> way;
        for (const auto &[_, from] : order) {
            for (size_t at = from; slots_[at].hash && !seen[at]; at = find(slots_[at].parent)) {
                seen[at] = true;
                way.push_back(at);
            }
            for (; !way.empty(); way.pop_back()) {
                const Entry &entry = slots_[way.back()];
                columns.hashes.push_back(entry.hash);
                columns.parents.push_back(entry.parent);
                columns.masks.push_back(entry.mask);
            }
        }
        return columns;
    }

  private:
    struct Entry {
        uint64_t hash = 0, parent = 0;
        uint8_t mask = 0;  // of tiers
    };

    size_t home(uint64_t hash) const {  // nobody who chooses hashes can choose where they fall
        const auto product = static_cast<unsigned __int128>(hash ^ seed_) * 0x9E3779B97F4A7C15u;
        return (static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64)) & (slots_.size() - 1);
    }
    size_t after(size_t at) const { return (at + 1) & (slots_.size() - 1); }
    size_t find(uint64_t hash) const {  // its slot, or the free one where it would be; a free one for 0
        size_t at = home(hash);
        while (slots_[at].hash && slots_[at].hash != hash) at = after(at);
        return at;
    }
    void prefetch(const uint64_t *hashes, size_t count) const {
        for (size_t i = 0; i < count; i++) __builtin_prefetch(&slots_[home(hashes[i])]);
    }
    void reserve(size_t size) {
        if (size <= slots_.size() / 4 * 3) return;
        size_t larger = slots_.empty() ? 64 : slots_.size();
        while (size > larger / 4 * 3) larger *= 2;
        for (const Entry &entry : std::exchange(slots_, std::vector<Entry>(larger)))
            if (entry.hash) slots_[find(entry.hash)] = entry;
    }
    void erase(size_t hole) {
        const size_t wrap = slots_.size() - 1;
        for (size_t at = after(hole); slots_[at].hash; at = after(at)) {
            if (((at - home(slots_[at].hash)) & wrap) < ((at - hole) & wrap)) continue;  // it must not go before its home
            slots_[hole] = slots_[at];
            hole = at;
        }
        slots_[hole] = {};
        size_--;
    }

    uint64_t seed_;
    std::vector<Entry> slots_;
    size_t size_ = 0;
    Digest digest_{};
};

}  // namespace radix
