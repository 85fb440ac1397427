// What changes the tree.
#include "tree.hpp"

namespace radix {

Tree::Tree(uint64_t max_blocks, uint64_t max_blocks_per_worker, uint64_t seed)
    : max_blocks_(max_blocks), max_blocks_per_worker_(max_blocks_per_worker),
      capacity_(2 * max_blocks),  // a held block may bring one that is not: its parent
      hashes_(capacity_), nodes_(capacity_), free_(capacity_),
      table_(hashes_, capacity_, seed), sets_(capacity_, ~seed) {}

// All the cache misses of a step at once. Inline: GCC takes a function that only prefetches for one without effect.
RADIX_INLINE void Tree::prefetch(const uint64_t *hashes, uint64_t *places, size_t count) const {
    for (size_t i = 0; i < count; i++) table_.prefetch(places[i] = table_.place(hashes[i]));
    if (count < 2) return;
    for (size_t i = 0; i < count; i++) {
        const uint32_t id = table_.guess(places[i]);
        if (id == NONE) continue;
        __builtin_prefetch(&hashes_[id]);
        __builtin_prefetch(&nodes_[id]);
    }
}

size_t Tree::store(uint32_t number, const uint64_t *hashes, size_t count, uint64_t parent, int tier) {
    commit(std::min(STEP, count));
    std::lock_guard<TreeLock> lock(lock_);
    Worker &worker = this->worker(number);
    uint32_t above = parent == ROOT_HASH ? ROOT : find(parent);
    size_t stored = 0;
    uint64_t places[STEP];
    for (size_t i = 0; i < count; parent = hashes[i++]) {
        if (i % STEP == 0) {
            if (i) step(std::min(STEP, count - i));
            prefetch(hashes + i, places, std::min(STEP, count - i));
        }
        uint32_t id = table_.find(places[i % STEP], hashes[i]);
        const uint32_t mask = id == NONE ? 0 : sets_.mask(nodes_[id].set, number);
        const bool full = worker.count >= max_blocks_per_worker_ || entries_ >= max_blocks_;
        if (!mask && full) {
            worker.refused++;
        } else if (!(mask >> tier & 1)) {
            if (!mask) {
                id = place(worker, id, hashes[i], above, parent);
                mark_page(worker, id);
                worker.count++;
                entries_++;
            }
            change(number, worker, id, mask, mask | 1u << tier);
            count_digest(worker.digest, hashes + i, 1, tier, true);
            stored++;
        }
        above = id;
    }
    return stored;
}

size_t Tree::remove(uint32_t number, const uint64_t *hashes, size_t count, int tier) {
    commit(0);
    std::lock_guard<TreeLock> lock(lock_);
    if (number >= workers_.size()) return 0;
    Worker &worker = workers_[number];
    size_t removed = 0;
    uint64_t places[STEP];
    for (size_t i = 0; i < count; i++) {
        if (i % STEP == 0) {
            if (i) step(0);
            prefetch(hashes + i, places, std::min(STEP, count - i));
        }
        const uint32_t id = table_.find(places[i % STEP], hashes[i]);
        const uint32_t mask = id == NONE ? 0 : sets_.mask(nodes_[id].set, number);
        if (!(mask >> tier & 1)) continue;
        const uint32_t left = mask & ~(1u << tier);
        change(number, worker, id, mask, left);
        count_digest(worker.digest, hashes + i, 1, tier, false);
        removed++;
        if (left) continue;
        entries_--;
        if (!--worker.count) {
            worker.irregular = false;
            states_[number] = CLEAN;
        }
        if (nodes_[id].set == EMPTY) {
            vacate(id);
            compact();
        }
    }
    return removed;
}

size_t Tree::clear(uint32_t number) {
    commit(0);
    std::lock_guard<TreeLock> lock(lock_);
    if (number >= workers_.size()) return 0;
    const Worker gone = std::exchange(workers_[number], {});
    entries_ -= gone.count;
    states_[number] = LEAVING;
    std::vector<uint32_t> ids;
    for (size_t page = 0; gone.count && page < gone.pages.size(); page++) {
        if (!gone.pages[page]) continue;
        step(0);
        ids.clear();
        for (uint32_t id = page * PAGE; id < std::min<size_t>(top_, (page + 1) * PAGE); id++)
            if (sets_.mask(nodes_[id].set, number)) ids.push_back(id);
        for (const uint32_t id : ids) table_.prefetch(table_.place(hashes_[id]));
        for (const uint32_t id : ids) {
            give_set(id, sets_.with(nodes_[id].set, number, 0));
            if (nodes_[id].set == EMPTY) vacate(id);
        }
    }
    states_[number] = CLEAN;
    for (size_t calls = 1; compact(); calls++)
        if (calls % (STEP / 4) == 0) step(0);
    return gone.count;
}

void Tree::apply(uint32_t number, const Changes &changes) {
    for (size_t i = 0, start = 0; i < changes.kinds.size(); start = changes.ends[i++]) {
        const uint64_t *hashes = changes.hashes.data() + start;
        const size_t count = changes.ends[i] - start;
        switch (changes.kinds[i]) {
            case STORE: store(number, hashes, count, changes.parents[i], changes.tiers[i]); break;
            case REMOVE: remove(number, hashes, count, changes.tiers[i]); break;
            default: clear(number);
        }
    }
}

// Let readers in, and have the memory for what the next step stores before they are shut out.
void Tree::step(size_t blocks) {
    lock_.unlock();
    commit(blocks);
    lock_.let_in();
    lock_.lock();
}

bool Tree::committed(size_t blocks) const {
    const size_t end = top_ + 2 * blocks;  // a block may bring one more: its parent
    return hashes_.committed(end) && nodes_.committed(end) && free_.committed(stacked_ + FREED) &&
           table_.committed(2 * blocks + FREED);
}

void Tree::commit(size_t blocks) {
    const size_t end = top_ + 2 * blocks;
    hashes_.commit(end);
    nodes_.commit(end);
    free_.commit(stacked_ + FREED);
    table_.commit(2 * blocks + FREED);
}

Tree::Worker &Tree::worker(uint32_t number) {
    if (number >= workers_.size()) {
        workers_.resize(number + 1);
        states_.resize(number + 1);
    }
    return workers_[number];
}

// The node of a block that `worker` is about to hold: below `above`, whose hash is `parent`, if it is new.
uint32_t Tree::place(Worker &worker, uint32_t id, uint64_t hash, uint32_t above, uint64_t parent) {
    if (id != NONE && nodes_[id].set != EMPTY) {
        if (nodes_[id].parent != above) worker.irregular = true;
        return id;
    }
    if (id == NONE) id = make_node(hash);
    if (above == NONE) above = find(parent);
    if (above == NONE) above = make_node(parent);  // nobody holds it: it is there for its children
    nodes_[id].parent = above;
    if (above < ROOT) children_.add(nodes_[above].children, id);
    return id;
}

uint32_t Tree::free_id() {  // below top_; NONE when all are in use
    while (stacked_)
        if (const uint32_t id = free_[--stacked_]; id < top_ && is_free(id)) return id;
    return NONE;
}

uint32_t Tree::make_node(uint64_t hash) {
    uint32_t id = free_id();
    if (id == NONE) id = top_++;
    used_++;
    hashes_[id] = hash;
    nodes_[id].set = EMPTY;
    nodes_[id].parent = NONE;
    table_.insert(table_.place(hash), id);
    return id;
}

void Tree::free_node(uint32_t id) {
    table_.erase(table_.place(hashes_[id]), id);
    leave_id(id);
}

void Tree::leave_id(uint32_t id) {
    used_--;
    hashes_[id] = ROOT_HASH;
    nodes_[id].set = EMPTY;
    nodes_[id].parent = NONE;
    if (id + 1 < top_) free_[stacked_++] = id;
    while (top_ && is_free(top_ - 1)) top_--;
    if (!top_) stacked_ = 0;
    hashes_.trim(top_);
    nodes_.trim(top_);
    free_.trim(stacked_);
}

// Nobody holds the block any more. Its node stays while it has children.
void Tree::vacate(uint32_t id) {
    const uint32_t parent = nodes_[id].parent;
    nodes_[id].parent = NONE;
    if (parent < ROOT) {
        children_.remove(nodes_[parent].children, id);
        if (parent != id && nodes_[parent].set == EMPTY && children_.empty(nodes_[parent].children)) free_node(parent);
    }
    if (children_.empty(nodes_[id].children)) free_node(id);
}

// Move the last nodes into holes, a few at a time, so that memory goes back when blocks have gone in any order.
bool Tree::compact() {
    int moves = 0;
    for (; moves < 4 && top_ - used_ > KEPT && top_ - used_ > top_ / 2; moves++) {
        const uint32_t from = top_ - 1;
        table_.prefetch(table_.place(hashes_[from - std::min(from, AHEAD)]));
        const uint32_t above = nodes_[from].parent;
        const size_t siblings = above < ROOT ? children_.size(nodes_[above].children) : 0;
        if (std::max(siblings, children_.size(nodes_[from].children)) > LARGE_HUB) return false;
        const uint32_t to = free_id();
        used_++;
        hashes_[to] = hashes_[from];
        nodes_[to] = std::exchange(nodes_[from], {EMPTY, NONE, 0});
        table_.rename(table_.place(hashes_[from]), from, to);
        children_.for_each(nodes_[to].children,
                           [&](uint32_t child) { nodes_[child == from ? to : child].parent = to; });
        if (const uint32_t parent = nodes_[to].parent; parent < ROOT) {
            children_.remove(nodes_[parent].children, from);
            children_.add(nodes_[parent].children, to);
        }
        for (const uint32_t member : sets_.members(nodes_[to].set)) mark_page(workers_[member >> TIERS], to);
        leave_id(from);
    }
    return moves > 0;
}

void Tree::mark_page(Worker &worker, uint32_t id) {
    if (id / PAGE >= worker.pages.size()) worker.pages.resize(id / PAGE + 1);
    worker.pages[id / PAGE] = true;
}

void Tree::give_set(uint32_t id, uint32_t set) {
    sets_.hold(set);
    sets_.drop(nodes_[id].set);
    nodes_[id].set = set;
}

// The tiers in which a worker holds a block change from `mask` to `now`. Keeps count of its orphans: a worker that has
// none, at a level, holds all that is above any block that it holds.
void Tree::change(uint32_t number, Worker &worker, uint32_t id, uint32_t mask, uint32_t now) {
    const uint32_t gained = levels(now) & ~levels(mask), lost = levels(mask) & ~levels(now);
    const bool orphaned = worker.orphans[TIERS - 1] || worker.orphans[0] || worker.orphans[1];
    auto count = [&](uint32_t bits, int by) {
        for (int level = 0; bits >> level; level++) worker.orphans[level] += (bits >> level & 1) * by;
    };
    if (nodes_[id].parent != id && (gained || orphaned))
        count((gained | lost) & ~levels_at(nodes_[id].parent, number), gained ? 1 : -1);
    if (lost || (gained && orphaned))
        children_.for_each(nodes_[id].children, [&](uint32_t child) {
            if (child != id) count((gained | lost) & levels_at(child, number), gained ? -1 : 1);
        });
    give_set(id, sets_.with(nodes_[id].set, number, now));
    const bool holes = worker.irregular || worker.orphans[0] || worker.orphans[1] || worker.orphans[TIERS - 1];
    states_[number] = holes ? HOLES : CLEAN;
}

void Tree::check() {
    auto must = [](bool holds, const char *what) {
        if (!holds) throw std::logic_error(what);
    };
    std::vector<uint32_t> blocks(sets_.size());
    std::vector<Worker> workers(workers_.size());
    size_t entries = 0, children = 0, linked = 0, ids = 0;
    for (uint32_t id = 0; id < top_; id++) {
        const uint32_t set = nodes_[id].set, parent = nodes_[id].parent;
        if (is_free(id)) {
            must(set == EMPTY && parent == NONE && children_.empty(nodes_[id].children), "a free node is blank");
            continue;
        }
        ids++;
        must(find(hashes_[id]) == id, "a node is found by its hash");
        must((set == EMPTY) == (parent == NONE), "a held block has a parent, another has none");
        must(set != EMPTY || !children_.empty(nodes_[id].children), "a block that nobody holds has children");
        children_.for_each(nodes_[id].children, [&](uint32_t child) {
            must(child < top_ && nodes_[child].parent == id, "a child's parent is the one that has it");
            children++;
        });
        linked += parent < ROOT;
        blocks[set]++;
        for (const uint32_t member : sets_.members(set)) {
            Worker &worker = workers.at(member >> TIERS);
            worker.count++;
            entries++;
            must(workers_[member >> TIERS].pages.at(id / PAGE), "a worker's page");
            for (int tier = 0; tier < TIERS; tier++) {
                if (member >> tier & 1) count_digest(worker.digest, &hashes_[id], 1, tier, true);
                const uint32_t above = parent == id ? 7 : levels_at(parent, member >> TIERS);
                worker.orphans[tier] += (levels(member & TIER_MASK) & ~above) >> tier & 1;
            }
        }
    }
    must(entries == entries_, "the number of entries");
    must(children == linked, "each linked block is a child");
    must(ids == used_ && (!top_ || !is_free(top_ - 1)), "the number of nodes");
    for (uint32_t set = 1; set < sets_.size(); set++) must(blocks[set] == sets_.blocks(set), "a set's blocks");
    for (uint32_t number = 0; number < workers_.size(); number++) {
        const Worker &is = workers_[number], &should = workers[number];
        must(is.count == should.count && is.digest == should.digest, "a worker's count and digest");
        must(is.orphans == should.orphans, "a worker's orphans");
        const bool holes = is.irregular || is.orphans != std::array<uint32_t, TIERS>{};
        must(states_[number] == (holes ? HOLES : CLEAN), "a worker's state");
    }
}

}  // namespace radix
