// Bytes as operations on a tree. tests/support/tree_streams.py reads the same bytes; keep them alike.
//
// Blocks are those of a fixed forest, where each has one true parent. Stores may lie about parents, queries may not: a
// query is a chain. A byte that is missing is 0, and a stream ends where an operation would begin.
#pragma once
#include <unordered_map>

#include "model.hpp"

constexpr uint32_t WORKERS[] = {0, 1, 2, 3, 7, 40, 300, 1000};
struct Caps {
    size_t all, worker;
};
constexpr Caps CAPS[] = {{1 << 17, 1 << 16}, {60, 25}, {1, 1}, {900, 300}};

// Chains 0 to 11 have 240 blocks and share trunks. 12 to 14 are long, and 15 has hashes that are neighbours in a table
// of seed 0. 16 to 18 are stars: leaves that all follow one block of chain 0.
class Forest {
  public:
    static constexpr uint32_t SHORT = 12, CROWD = 15, STAR = 16, CHAINS = 19;

    Forest() {
        for (uint32_t chain = 0; chain < CHAINS; chain++) {
            const uint32_t length = chain < SHORT ? 240 : chain < CROWD ? 1024 : 512;
            for (uint64_t i = 0, tried = 0; i < length; i++) {
                uint64_t family = chain, hash;
                if (chain == CROWD) {
                    while (table_place(mixed(family << 32 | ++tried)) >> 58) {}
                    hash = mixed(family << 32 | tried);
                } else {
                    while (family < SHORT && family && i < family * 37 % 200 + 1) family /= 2;
                    hash = mixed(family << 32 | (i + 1));
                }
                parents[hash] = chain >= STAR ? chains[0][chain] : i ? chains[chain][i - 1] : 0;
                chains[chain].push_back(hash);
            }
        }
    }
    static uint64_t unknown(uint64_t i) { return mixed(uint64_t(0xffff) << 32 | i); }

    Hashes chains[CHAINS];
    std::unordered_map<uint64_t, uint64_t> parents;  // the true ones

  private:
    static uint64_t table_place(uint64_t hash) {  // that of radix::Table; without it there is no crowd, no more
        const auto product = static_cast<unsigned __int128>(hash) * 0x9E3779B97F4A7C15;
        return (static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64)) * 0xD1B54A32D192ED03;
    }
};

enum class Kind : uint8_t { STORE, REMOVE, CLEAR };
struct Change {
    Kind kind;
    uint8_t tier;
    uint64_t parent;
    Hashes hashes;
};

class Stream {
  public:
    Stream(const Forest &forest, const uint8_t *data, size_t size) : forest_(forest), at_(data), end_(data + size) {}

    bool ended() const { return at_ == end_; }
    uint8_t byte() { return ended() ? 0 : *at_++; }

    // Worker in bits 0 to 2, tier in 3 and 4, what in 5 to 7. All changes that it becomes are of one worker.
    std::vector<Change> changes(uint32_t &worker, uint8_t what) {
        worker = WORKERS[what & 7];
        const uint8_t tier = (what >> 3 & 3) % 3;
        std::vector<Change> all;
        if (what >> 5 == 3) {  // a part of a chain, with what is before it left out
            const uint8_t chain = byte() % Forest::CHAINS;
            const uint64_t parent = forest_.chains[chain][place(chain, byte())];
            all.push_back({Kind::STORE, tier, parent, part(chain)});
        } else if (what >> 5 < 3) {  // the truth
            const uint8_t chain = byte() % Forest::CHAINS;
            const Hashes part = this->part(chain);
            if (chain < Forest::STAR)
                all.push_back({Kind::STORE, tier, part.empty() ? 0 : forest_.parents.at(part[0]), part});
            else
                for (const uint64_t leaf : part) all.push_back({Kind::STORE, tier, forest_.parents.at(leaf), {leaf}});
        } else if (what >> 5 == 4) {  // any blocks below any
            const uint8_t shape = byte();
            Hashes picked;
            for (int i = shape & 3; i >= 0; i--) picked.push_back(block());
            const uint64_t parents[] = {0, picked[0], picked.back(), Forest::unknown(shape >> 4)};
            const uint64_t parent = shape & 16 ? block() : parents[shape >> 2 & 3];
            all.push_back({Kind::STORE, tier, parent, picked});
        } else if (what >> 5 == 7 && byte() % 4 == 0) {
            all.push_back({Kind::CLEAR, 0, 0, {}});
        } else {
            const Hashes part = this->part(byte() % Forest::CHAINS);
            const uint8_t order = byte();
            Change removal{Kind::REMOVE, tier, 0, {}};
            for (size_t i = 0; i < part.size(); i += 1 + order % 8) removal.hashes.push_back(part[i]);
            if (order & 128) std::reverse(removal.hashes.begin(), removal.hashes.end());
            all.push_back(std::move(removal));
        }
        return all;
    }
    Hashes query() {  // the start of a chain, and blocks that nobody holds
        const uint8_t chain = byte() % Forest::CHAINS, length = byte(), tail = byte() % 4;
        const size_t end = place(chain, length);
        Hashes query;
        if (chain >= Forest::STAR) {
            query.assign(forest_.chains[0].begin(), forest_.chains[0].begin() + chain + 1);
            query.push_back(forest_.chains[chain][end]);
        } else {
            query.assign(forest_.chains[chain].begin(), forest_.chains[chain].begin() + end + (length > 0));
        }
        for (uint8_t i = 0; i < tail; i++) query.push_back(Forest::unknown(i));
        return query;
    }
    uint64_t block() {
        const uint8_t chain = byte() % Forest::CHAINS;
        return forest_.chains[chain][place(chain, byte())];
    }

  private:
    size_t place(uint8_t chain, uint8_t at) const {
        const size_t scale = chain < Forest::SHORT ? 1 : chain < Forest::CROWD ? 4 : 2;
        return at * scale % forest_.chains[chain].size();
    }
    Hashes part(uint8_t chain) {
        const Hashes &blocks = forest_.chains[chain];
        const size_t start = place(chain, byte()), length = place(chain, byte()) + 1;
        return Hashes(blocks.begin() + start, blocks.begin() + std::min(start + length, blocks.size()));
    }

    const Forest &forest_;
    const uint8_t *at_, *const end_;
};
