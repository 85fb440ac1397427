// What radix/tree.py says that a tree does, in maps: slow and plain, made without radix/native.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <span>
#include <unordered_map>
#include <vector>

using Hashes = std::vector<uint64_t>;

constexpr uint64_t KEYS[2] = {0x9E3779B97F4A7C15, 0xD1B54A32D192ED03};              // of radix.digest
constexpr uint64_t SALTS[3] = {0, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB};

inline uint64_t mixed(uint64_t x) {  // splitmix64's finalizer
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

class Model {
  public:
    using Depths = std::array<uint32_t, 3>;  // leading blocks on the device, on device or host, in any tier
    struct Block {
        uint64_t parent;
        std::map<uint32_t, uint32_t> holders;  // worker -> bit mask of tiers
    };
    struct Account {
        size_t count = 0, refused = 0;
        std::array<uint64_t, 2> digest{};
    };

    Model(size_t most, size_t most_of_worker) : most_(most), most_of_worker_(most_of_worker) {}

    size_t store(uint32_t worker, const Hashes &hashes, uint64_t parent, int tier) {
        size_t stored = 0;
        for (const uint64_t hash : hashes) {
            const bool held = blocks.contains(hash) && blocks[hash].holders.contains(worker);
            if (!held && !room(worker)) {
                refused_[worker]++;
            } else {
                Block &block = blocks.try_emplace(hash, Block{parent, {}}).first->second;
                uint32_t &tiers = block.holders[worker];
                stored += !(tiers >> tier & 1);
                tiers |= 1u << tier;
                counts_[worker] += !held;
                entries += !held;
            }
            parent = hash;
        }
        return stored;
    }

    size_t remove(uint32_t worker, const Hashes &hashes, int tier) {
        size_t removed = 0;
        for (const uint64_t hash : hashes) {
            const auto block = blocks.find(hash);
            if (block == blocks.end()) continue;
            const auto holder = block->second.holders.find(worker);
            if (holder == block->second.holders.end() || !(holder->second >> tier & 1)) continue;
            removed++;
            holder->second &= ~(1u << tier);
            if (!holder->second) leave(block, worker);
        }
        return removed;
    }

    size_t clear(uint32_t worker) {
        const size_t count = counts_[worker];
        for (auto block = blocks.begin(); block != blocks.end();) {
            const auto at = block++;
            if (at->second.holders.contains(worker)) leave(at, worker);
        }
        refused_[worker] = 0;
        return count;
    }

    std::map<uint32_t, Depths> match(const Hashes &query) const {
        std::map<uint32_t, Depths> found;
        if (query.empty()) return found;
        for (const uint32_t worker : holders(query[0])) {
            Depths &depths = found[worker];
            for (int slowest = 0; slowest < 3; slowest++) {
                auto held = [&](uint64_t hash) {
                    const auto block = blocks.find(hash);
                    if (block == blocks.end()) return false;
                    const auto holder = block->second.holders.find(worker);
                    return holder != block->second.holders.end() && (holder->second & ((2u << slowest) - 1)) != 0;
                };
                while (depths[slowest] < query.size() && held(query[depths[slowest]])) depths[slowest]++;
            }
        }
        return found;
    }
    void record(uint64_t deepest) {  // of a match
        matched.push_back(deepest);
        if (matched.size() > 4096) matched.pop_front();
    }

    size_t count(uint32_t worker) const { return of(counts_, worker); }
    size_t room(uint32_t worker) const { return std::min(most_ - entries, most_of_worker_ - count(worker)); }

    std::map<uint32_t, Account> accounts(std::span<const uint32_t> workers) const {
        std::map<uint32_t, Account> all;
        for (const uint32_t worker : workers) all[worker].refused = of(refused_, worker);
        for (const auto &[hash, block] : blocks)
            for (const auto &[worker, tiers] : block.holders) {
                all[worker].count++;
                for (int tier = 0; tier < 3; tier++)
                    for (int lane = 0; lane < 2 && tiers >> tier & 1; lane++)
                        all[worker].digest[lane] += mixed((hash ^ SALTS[tier]) + KEYS[lane]);
            }
        return all;
    }

    Hashes held_by(uint32_t worker) const {
        Hashes held;
        for (const auto &[hash, block] : blocks)
            if (block.holders.contains(worker)) held.push_back(hash);
        return held;
    }
    std::vector<uint32_t> holders(uint64_t hash) const {
        std::vector<uint32_t> workers;
        if (const auto block = blocks.find(hash); block != blocks.end())
            for (const auto &[worker, _] : block->second.holders) workers.push_back(worker);
        return workers;
    }
    Hashes children(uint64_t parent) const {
        Hashes found;
        for (const auto &[hash, block] : blocks)
            if (block.parent == parent) found.push_back(hash);
        return found;
    }
    std::map<uint64_t, uint64_t> ways_up() const {  // the recently matched blocks and those above: block -> parent
        std::map<uint64_t, uint64_t> ways;
        for (const uint64_t end : std::set(matched.begin(), matched.end()))
            for (auto at = blocks.find(end); at != blocks.end(); at = blocks.find(at->second.parent))
                if (!ways.emplace(at->first, at->second.parent).second) break;
        return ways;
    }

    std::unordered_map<uint64_t, Block> blocks;  // the held ones
    std::deque<uint64_t> matched;                // the deepest block of each match
    size_t entries = 0;

  private:
    static size_t of(const std::map<uint32_t, size_t> &numbers, uint32_t worker) {
        const auto at = numbers.find(worker);
        return at == numbers.end() ? 0 : at->second;
    }
    void leave(std::unordered_map<uint64_t, Block>::iterator block, uint32_t worker) {
        block->second.holders.erase(worker);
        if (block->second.holders.empty()) blocks.erase(block);
        counts_[worker]--;
        entries--;
    }

    const size_t most_, most_of_worker_;
    std::map<uint32_t, size_t> counts_, refused_;
};
