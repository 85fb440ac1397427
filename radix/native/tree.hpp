// The prefix tree: radix.tree.PrefixTree. README.md beside this file describes the layout.
#pragma once
#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "changes.hpp"
#include "children.hpp"
#include "digest.hpp"
#include "holders.hpp"
#include "lock.hpp"
#include "memory.hpp"
#include "table.hpp"

namespace radix {

constexpr uint64_t ROOT_HASH = 0;
constexpr uint32_t MAX_WORKERS = 65536;
constexpr size_t HEAT_WINDOW = 4096;
constexpr uint64_t DEFAULT_MAX_BLOCKS = 1 << 26, DEFAULT_MAX_BLOCKS_PER_WORKER = 1 << 24, LARGEST_MAX_BLOCKS = 1 << 29;

using Hashes = std::span<const uint64_t>;

struct Matched {  // rows of `count`: workers, then their depth within the device, device and host, all tiers
    std::vector<uint32_t> rows;
    size_t count = 0;
    const uint32_t *depths(int tier) const { return rows.data() + (1 + tier) * count; }
};

struct Dumped {
    std::vector<uint64_t> hashes, parents;
    std::vector<uint32_t> holder_sets, set_ends, members;
};

struct Heat {
    std::vector<uint64_t> records;  // the deepest blocks of recent matches
    std::unordered_map<uint64_t, uint64_t> parents;  // of them, and of all held blocks above them
};

class Tree {
  public:
    Tree(uint64_t max_blocks, uint64_t max_blocks_per_worker, uint64_t seed);

    // Writers: in one's turn.
    std::mutex &turn() { return lock_.turn; }
    bool committed(size_t blocks) const;  // or storing them has to wait for memory
    size_t store(uint32_t number, const uint64_t *hashes, size_t count, uint64_t parent, int tier);
    size_t remove(uint32_t number, const uint64_t *hashes, size_t count, int tier);
    size_t clear(uint32_t number);
    void apply(uint32_t number, const Changes &changes);

    // Readers. In one's turn, too, those that go through the tree in slices: blocks, children of the root, heat.
    Matched match(Hashes query) const;
    void match_many(std::span<const Hashes> queries, Matched *matches) const;
    Digest digest(uint32_t number) const;
    size_t count(uint32_t number) const;
    size_t refused(uint32_t number) const;
    size_t room(uint32_t number) const;
    size_t size() const;
    std::vector<uint64_t> blocks(uint32_t number) const;
    std::vector<uint32_t> holders(uint64_t hash) const;
    std::vector<uint64_t> children(uint64_t hash) const;
    Heat heat() const;
    Dumped dump();  // in one's turn
    void check();   // in one's turn; throws std::logic_error

  private:
    static constexpr uint32_t ROOT = NONE - 1;  // the parent of first blocks; NONE: of blocks that nobody holds
    static constexpr uint32_t EMPTY = HolderSets::EMPTY;
    static constexpr size_t STEP = 128;         // blocks between two looks at who waits
    static constexpr size_t SLICE = (1 << 14) / RADIX_SHRINK;  // nodes, in scans
    static constexpr uint32_t PAGE = 256;                      // ids, of a worker's map of where its nodes are
    static constexpr uint32_t AHEAD = 16;
    static constexpr size_t FREED = 4 * PAGE;   // nodes at most, in a step
    static constexpr size_t KEPT = (1 << 18) / RADIX_SHRINK;   // free ids that are left free: 5 MB
    static constexpr size_t LARGE_HUB = 1 << 12;               // children: too many to move a node of theirs in a step
    static constexpr size_t FIRST = 8, WIDTH = 16, SLICE_HASHES = 512;  // probes at once: of a search's first round, of others
    enum State : uint8_t { CLEAN = 0, HOLES = 1, LEAVING = 2 };

    struct Node {
        uint32_t set;       // of holders
        uint32_t parent;    // an id, ROOT, or NONE while nobody holds the block
        uint32_t children;  // a Children::Link
    };
    struct Worker {
        Digest digest{};
        uint64_t refused = 0;
        uint32_t count = 0;
        std::vector<bool> pages;                   // of PAGE ids: where its nodes are, or were
        std::array<uint32_t, TIERS> orphans{};     // blocks whose parent it does not hold, by level
        bool irregular = false;                    // has stored a block under another parent than the block has
    };
    struct Point {
        uint32_t at, set;
    };
    using Points = std::vector<Point>;

    // A block in a tier counts for that level and those below it: "device", "device or host", "any".
    static uint32_t levels(uint32_t mask) { return mask & 1 ? 7 : mask & 2 ? 6 : mask & 4; }
    uint32_t find(uint64_t hash) const { return table_.find(table_.place(hash), hash); }
    uint32_t levels_at(uint32_t id, uint32_t number) const {
        return id == ROOT ? 7 : id == NONE ? 0 : levels(sets_.mask(nodes_[id].set, number));
    }

    void step(size_t blocks);
    void commit(size_t blocks);
    Worker &worker(uint32_t number);
    uint32_t place(Worker &worker, uint32_t id, uint64_t hash, uint32_t above, uint64_t parent);
    bool is_free(uint32_t id) const { return hashes_[id] == ROOT_HASH; }
    uint32_t free_id();
    uint32_t make_node(uint64_t hash);
    void free_node(uint32_t id);
    void leave_id(uint32_t id);
    void vacate(uint32_t id);
    bool compact();
    void give_set(uint32_t id, uint32_t set);
    static void mark_page(Worker &worker, uint32_t id);
    void change(uint32_t number, Worker &worker, uint32_t id, uint32_t mask, uint32_t now);
    void prefetch(const uint64_t *hashes, uint64_t *places, size_t count) const;

    Matched lookup(const uint64_t *hashes, size_t count) const;
    void probe(const uint64_t *hashes, Point *points, size_t count) const;
    void search(const uint64_t *hashes, size_t count, Points &points) const;
    void rescan(const uint64_t *hashes, size_t count, const std::vector<uint32_t> &rows, Matched &matched) const;
    template <class Do> void scan(Do act) const;

    const uint64_t max_blocks_, max_blocks_per_worker_;
    const size_t capacity_;
    Region<uint64_t> hashes_;
    Region<Node> nodes_;
    Children children_;
    Region<uint32_t> free_;  // a stack of ids that were free when they were put on it
    uint32_t stacked_ = 0, used_ = 0;
    uint32_t top_ = 0;       // ids in use are below
    Table table_;
    HolderSets sets_;
    std::vector<Worker> workers_;
    std::vector<uint8_t> states_;
    uint64_t entries_ = 0;
    mutable TreeLock lock_;
    mutable std::array<std::atomic<uint64_t>, HEAT_WINDOW> recent_{};
    mutable std::atomic<uint64_t> matches_{0};
};

}  // namespace radix
