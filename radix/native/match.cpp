// What reads the tree.
#include <algorithm>
#include <mutex>
#include <shared_mutex>

#include "tree.hpp"

namespace radix {

using Reading = std::shared_lock<TreeLock>;

// Which set of workers holds each of these blocks. The misses of all overlap.
void Tree::probe(const uint64_t *hashes, Point *points, size_t count) const {
    uint64_t places[WIDTH];
    for (size_t start = 0; start < count; start += WIDTH) {
        const size_t n = std::min(WIDTH, count - start);
        Point *part = points + start;
        for (size_t i = 0; i < n; i++) table_.prefetch(places[i] = table_.place(hashes[part[i].at]));
        for (size_t i = 0; i < n; i++)
            if (const uint32_t id = table_.guess(places[i]); id != NONE) {
                __builtin_prefetch(&hashes_[id]);
                __builtin_prefetch(&nodes_[id]);
            }
        for (size_t i = 0; i < n; i++) {
            const uint32_t id = table_.find(places[i], hashes[part[i].at]);
            part[i].set = id == NONE ? EMPTY : nodes_[id].set;
        }
    }
}

// Points on the path such that two neighbours have equal sets or are next to each other: where a worker has no holes it
// holds all between two blocks that it holds. Points after the first that nobody holds are left out.
void Tree::search(const uint64_t *hashes, size_t count, Points &points) const {
    static thread_local Points asked, merged;
    asked.clear();
    points.clear();
    for (size_t i = 0, at, before = count; i < FIRST; i++, before = at)
        if ((at = i * (count - 1) / (FIRST - 1)) != before) asked.push_back({static_cast<uint32_t>(at), EMPTY});
    while (!asked.empty()) {
        probe(hashes, asked.data(), asked.size());
        merged.resize(points.size() + asked.size());
        std::merge(points.begin(), points.end(), asked.begin(), asked.end(), merged.begin(),
                   [](const Point &a, const Point &b) { return a.at < b.at; });
        points.swap(merged);
        for (size_t i = 0; i < points.size(); i++)
            if (points[i].set == EMPTY) points.resize(i + 1);
        auto open = [&](size_t i) {
            return points[i].set != points[i + 1].set && points[i].at + 1 != points[i + 1].at;
        };
        size_t intervals = 0;
        for (size_t i = 0; i + 1 < points.size(); i++) intervals += open(i);
        const uint32_t share = static_cast<uint32_t>(WIDTH / std::max<size_t>(intervals, 1)) + !(intervals <= WIDTH);
        asked.clear();
        for (size_t i = 0; intervals && i + 1 < points.size(); i++) {
            if (!open(i)) continue;
            const uint32_t from = points[i].at, gap = points[i + 1].at - from, parts = std::min(share, gap - 1) + 1;
            for (uint32_t part = 1; part < parts; part++)
                asked.push_back({from + static_cast<uint32_t>(uint64_t(gap) * part / parts), EMPTY});
        }
    }
}

Matched Tree::match(Hashes query) const {
    Matched matched;
    match_many({&query, 1}, &matched);
    return matched;
}

// Locks and counts for some queries at once: with each, readers would mostly wait for each other's cache lines.
void Tree::match_many(std::span<const Hashes> queries, Matched *matches) const {
    uint64_t deepest[WIDTH];
    for (size_t next = 0; next < queries.size();) {
        uint64_t held = 0;
        {
            Reading reading(lock_);
            const size_t end = std::min(queries.size(), next + WIDTH);
            for (size_t hashes = 0; next < end && hashes < WIDTH * SLICE_HASHES; hashes += queries[next++].size()) {
                matches[next] = lookup(queries[next].data(), queries[next].size());
                if (!matches[next].count) continue;
                const uint32_t *depths = matches[next].depths(TIERS - 1);
                deepest[held++] = queries[next][*std::max_element(depths, depths + matches[next].count) - 1];
            }
        }
        if (!held) continue;
        const uint64_t first = matches_.fetch_add(held, std::memory_order_relaxed);
        for (size_t i = 0; i < held; i++)
            recent_[(first + i) % HEAT_WINDOW].store(deepest[i], std::memory_order_relaxed);
    }
}

Matched Tree::lookup(const uint64_t *hashes, size_t count) const {
    static thread_local Points points;
    static thread_local std::vector<uint32_t> holed;
    Matched matched;
    if (!count) return matched;
    search(hashes, count, points);
    const Members first = sets_.members(points[0].set);
    for (const uint32_t member : first) matched.count += states_[member >> TIERS] != LEAVING;
    if (!matched.count) return matched;
    matched.rows.resize((1 + TIERS) * matched.count);
    holed.clear();
    uint32_t *workers = matched.rows.data(), row = 0;
    for (const uint32_t member : first) {
        const uint8_t state = states_[member >> TIERS];
        if (state == LEAVING) continue;
        if (state == HOLES) holed.push_back(row);
        workers[row++] = member >> TIERS;
    }
    for (size_t i = 0; i < points.size(); i++) {  // the last block of each run of equal sets
        if (i + 1 < points.size() && points[i + 1].set == points[i].set) continue;
        row = 0;
        for (const uint32_t member : sets_.members(points[i].set)) {
            while (row < matched.count && workers[row] < member >> TIERS) row++;
            if (row == matched.count) break;
            if (workers[row] != member >> TIERS) continue;
            const uint32_t reached = levels(member & TIER_MASK);
            for (int tier = 0; tier < TIERS; tier++)
                if (reached >> tier & 1) workers[(1 + tier) * matched.count + row] = points[i].at + 1;
        }
    }
    if (!holed.empty()) rescan(hashes, count, holed, matched);
    return matched;
}

// Workers that may have holes: block by block.
void Tree::rescan(const uint64_t *hashes, size_t count, const std::vector<uint32_t> &rows, Matched &matched) const {
    std::vector<uint32_t> open(rows.size(), (1u << TIERS) - 1);  // levels without a hole so far
    uint32_t *workers = matched.rows.data();
    Point points[WIDTH];
    size_t left = rows.size();
    uint32_t before = NONE;  // a set that was looked at tells nothing new
    for (size_t start = 0; start < count && left; start += WIDTH) {
        const size_t n = std::min(WIDTH, count - start);
        for (size_t i = 0; i < n; i++) points[i].at = static_cast<uint32_t>(start + i);
        probe(hashes, points, n);
        for (size_t i = 0; i < n && left; i++) {
            if (points[i].set == before) continue;
            before = points[i].set;
            for (size_t k = 0; k < rows.size(); k++) {
                if (!open[k]) continue;
                const uint32_t here = levels(sets_.mask(points[i].set, workers[rows[k]]));
                for (int tier = 0; tier < TIERS; tier++)
                    if (open[k] & ~here & 1u << tier) workers[(1 + tier) * matched.count + rows[k]] = points[i].at;
                if (!(open[k] &= here)) left--;
            }
        }
    }
    for (size_t k = 0; k < rows.size(); k++)
        for (int tier = 0; tier < TIERS; tier++)
            if (open[k] >> tier & 1) workers[(1 + tier) * matched.count + rows[k]] = static_cast<uint32_t>(count);
}

Digest Tree::digest(uint32_t number) const {
    Reading reading(lock_);
    return number < workers_.size() ? workers_[number].digest : Digest{};
}

size_t Tree::count(uint32_t number) const {
    Reading reading(lock_);
    return number < workers_.size() ? workers_[number].count : 0;
}

size_t Tree::refused(uint32_t number) const {
    Reading reading(lock_);
    return number < workers_.size() ? workers_[number].refused : 0;
}

size_t Tree::room(uint32_t number) const {
    Reading reading(lock_);
    const size_t held = number < workers_.size() ? workers_[number].count : 0;
    return std::min(max_blocks_per_worker_ - held, max_blocks_ - entries_);
}

size_t Tree::size() const {
    Reading reading(lock_);
    return entries_;
}

template <class Do> void Tree::scan(Do act) const {
    for (uint32_t start = 0;; start += SLICE) {
        Reading reading(lock_);
        if (start >= top_) return;
        for (uint32_t id = start; id < std::min<size_t>(top_, start + SLICE); id++) act(id);
    }
}

std::vector<uint64_t> Tree::blocks(uint32_t number) const {
    std::vector<uint64_t> found;
    if (!count(number)) return found;
    scan([&](uint32_t id) {
        if (sets_.mask(nodes_[id].set, number)) found.push_back(hashes_[id]);
    });
    std::sort(found.begin(), found.end());
    return found;
}

std::vector<uint32_t> Tree::holders(uint64_t hash) const {
    Reading reading(lock_);
    std::vector<uint32_t> found;
    const uint32_t id = hash == ROOT_HASH ? NONE : find(hash);
    if (id != NONE)
        for (const uint32_t member : sets_.members(nodes_[id].set))
            if (states_[member >> TIERS] != LEAVING) found.push_back(member >> TIERS);
    return found;
}

std::vector<uint64_t> Tree::children(uint64_t hash) const {
    std::vector<uint64_t> found;
    if (hash == ROOT_HASH) {
        scan([&](uint32_t id) {
            if (nodes_[id].parent == ROOT) found.push_back(hashes_[id]);
        });
    } else {
        Reading reading(lock_);
        const uint32_t id = find(hash);
        if (id != NONE) children_.for_each(nodes_[id].children, [&](uint32_t child) { found.push_back(hashes_[child]); });
    }
    std::sort(found.begin(), found.end());
    return found;
}

Heat Tree::heat() const {
    Heat heat;
    for (const auto &recent : recent_) {
        const uint64_t end = recent.load(std::memory_order_relaxed);
        if (end == ROOT_HASH) continue;
        heat.records.push_back(end);
        Reading reading(lock_);
        for (uint32_t id = find(end), up; id < ROOT && nodes_[id].set != EMPTY; id = up) {
            up = nodes_[id].parent;
            if (!heat.parents.emplace(hashes_[id], up == ROOT ? ROOT_HASH : hashes_[up]).second) break;
        }
    }
    return heat;
}

Dumped Tree::dump() {
    Dumped all;
    std::vector<uint32_t> rows(sets_.size(), NONE);
    for (uint32_t id = 0; id < top_; id++) {
        const uint32_t set = nodes_[id].set;
        if (set == EMPTY) continue;
        if (rows[set] == NONE) {
            rows[set] = static_cast<uint32_t>(all.set_ends.size());
            all.members.insert(all.members.end(), sets_.members(set).begin(), sets_.members(set).end());
            all.set_ends.push_back(static_cast<uint32_t>(all.members.size()));
        }
        all.hashes.push_back(hashes_[id]);
        all.parents.push_back(nodes_[id].parent == ROOT ? ROOT_HASH : hashes_[nodes_[id].parent]);
        all.holder_sets.push_back(rows[set]);
    }
    return all;
}

}  // namespace radix
