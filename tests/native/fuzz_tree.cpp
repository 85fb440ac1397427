// libFuzzer: radix::Tree against the model, answer by answer. `make fuzz` runs it.
#include <cstdio>
#include <cstdlib>

#include "radix/native/tree.hpp"
#include "streams.hpp"

namespace {

const Forest forest;
const bool printing = std::getenv("RADIX_FUZZ_PRINT");  // streams in hex, and the model's answers, a line an operation

void must(bool holds, const char *what) {
    if (holds) return;
    std::fprintf(stderr, "tree and model differ: %s\n", what);
    std::abort();
}

template <class T> void print(const T &values) {
    if (!printing) return;
    for (const auto value : values) std::printf(" %llu", static_cast<unsigned long long>(value));
}

class Pair {  // a tree and its model
  public:
    Pair(const Caps &caps, uint64_t seed) : tree_(caps.all, caps.worker, seed), model_(caps.all, caps.worker) {}

    void change(uint32_t worker, const Change &change) {
        const uint64_t *hashes = change.hashes.data();
        const size_t count = change.hashes.size();
        const size_t done = change_model(worker, change);
        if (change.kind == Kind::STORE)
            must(tree_.store(worker, hashes, count, change.parent, change.tier) == done, "store");
        else if (change.kind == Kind::REMOVE)
            must(tree_.remove(worker, hashes, count, change.tier) == done, "remove");
        else
            must(tree_.clear(worker) == done, "clear");
        ::print(std::array{done});
    }

    void apply(uint32_t worker, const std::vector<Change> &changes) {
        std::vector<uint8_t> kinds, tiers;
        std::vector<uint32_t> ends;
        Hashes parents, hashes;
        for (const Change &change : changes) {
            kinds.push_back(static_cast<uint8_t>(change.kind));
            tiers.push_back(change.tier);
            parents.push_back(change.parent);
            hashes.insert(hashes.end(), change.hashes.begin(), change.hashes.end());
            ends.push_back(static_cast<uint32_t>(hashes.size()));
            change_model(worker, change);
        }
        hashes.shrink_to_fit();  // so that one read too many is noticed
        tree_.apply(worker, {kinds, tiers, parents, ends, hashes});
    }

    void match(const Hashes &query) {
        const auto expected = model_.match(query);
        compare(query, expected, tree_.match(query));
        print(expected);
    }

    void match_many(const std::vector<Hashes> &queries, size_t count) {  // `count` in all, each as often as the others
        std::vector<std::map<uint32_t, Model::Depths>> expected;
        for (const Hashes &query : queries) print(expected.emplace_back(model_.match(query)));
        std::vector<std::span<const uint64_t>> all;
        for (size_t i = 0; i < count; i++) all.push_back(queries[i % queries.size()]);
        std::vector<radix::Matched> found(count);
        tree_.match_many(all, found.data());
        for (size_t i = 0; i < count; i++) compare(queries[i % queries.size()], expected[i % queries.size()], found[i]);
    }

    void look_at(uint64_t hash) {
        const auto holders = model_.holders(hash);
        const Hashes children = sorted(model_.children(hash));
        must(tree_.holders(hash) == holders, "holders");
        must(tree_.children(hash) == children, "children");
        ::print(holders);
        ::print(children);
    }

    void look() {
        tree_.check();
        must(tree_.size() == model_.entries, "entries");
        for (const auto &[worker, account] : model_.accounts(WORKERS)) {
            must(tree_.count(worker) == account.count && model_.count(worker) == account.count, "count");
            must(tree_.refused(worker) == account.refused, "refused");
            must(tree_.digest(worker) == account.digest, "digest");
            must(tree_.room(worker) == model_.room(worker), "room");
            ::print(std::array{account.count, account.refused, model_.room(worker)});
            ::print(account.digest);
        }
        for (const uint32_t worker : {WORKERS[0], WORKERS[5]})
            must(tree_.blocks(worker) == sorted(model_.held_by(worker)), "blocks");
        must(tree_.children(0) == sorted(model_.children(0)), "first blocks");
        look_at_dump(tree_.dump());
        const radix::Heat heat = tree_.heat();
        must(sorted(heat.records) == sorted(Hashes(model_.matched.begin(), model_.matched.end())), "what was matched");
        must(std::map(heat.parents.begin(), heat.parents.end()) == model_.ways_up(), "the ways up from it");
    }

  private:
    static void print(const std::map<uint32_t, Model::Depths> &matches) {
        for (const auto &[worker, depths] : matches) ::print(std::array{worker}), ::print(depths);
    }

    void compare(const Hashes &query, const std::map<uint32_t, Model::Depths> &expected, const radix::Matched &found) {
        must(found.count == expected.size(), "who matches");
        size_t row = 0;
        for (const auto &[worker, depths] : expected) {
            must(found.rows[row] == worker, "who matches");
            for (int tier = 0; tier < 3; tier++) {
                const uint32_t depth = found.depths(tier)[row];
                must(depth == depths[tier] || (depth > depths[tier] && misled_.contains(worker)), "how far");
            }
            row++;
        }
        if (!found.count) return;
        const uint32_t *depths = found.depths(2);  // where a liar looks deeper than it is, the tree goes by that
        model_.record(query[*std::max_element(depths, depths + found.count) - 1]);
    }

    template <class T> static std::vector<T> sorted(std::vector<T> values) {
        std::sort(values.begin(), values.end());
        return values;
    }

    size_t change_model(uint32_t worker, const Change &change) {
        if (change.kind == Kind::REMOVE) return model_.remove(worker, change.hashes, change.tier);
        if (change.kind == Kind::CLEAR) {
            misled_.erase(worker);
            return model_.clear(worker);
        }
        // Its depths may be too large who stores a block below a false parent that the block then has.
        uint64_t parent = change.parent;
        std::vector<std::pair<uint64_t, uint64_t>> false_links;
        for (const uint64_t hash : change.hashes) {
            const auto block = model_.blocks.find(hash);
            const bool held = block != model_.blocks.end() && block->second.holders.contains(worker);
            if (!held && parent != forest.parents.at(hash)) false_links.push_back({hash, parent});
            parent = hash;
        }
        const size_t stored = model_.store(worker, change.hashes, change.parent, change.tier);
        for (const auto &[hash, above] : false_links) {
            const auto block = model_.blocks.find(hash);
            if (block != model_.blocks.end() && block->second.parent == above) misled_.insert(worker);
        }
        return stored;
    }

    void look_at_dump(const radix::Dumped &dump) {
        must(dump.hashes.size() == model_.blocks.size(), "blocks in the dump");
        std::set<std::vector<uint32_t>> sets;
        for (size_t set = 0, start = 0; set < dump.set_ends.size(); start = dump.set_ends[set++])
            sets.insert({dump.members.begin() + start, dump.members.begin() + dump.set_ends[set]});
        must(sets.size() == dump.set_ends.size(), "a set stands in the dump once");
        const Hashes hashes = sorted(dump.hashes);
        must(std::adjacent_find(hashes.begin(), hashes.end()) == hashes.end(), "a block stands in the dump once");
        for (size_t i = 0; i < dump.hashes.size(); i++) {
            const auto block = model_.blocks.find(dump.hashes[i]);
            must(block != model_.blocks.end(), "blocks in the dump");
            must(dump.parents[i] == block->second.parent, "parents in the dump");
            const uint32_t set = dump.holder_sets[i], start = set ? dump.set_ends[set - 1] : 0;
            auto holder = block->second.holders.begin();
            must(dump.set_ends[set] - start == block->second.holders.size(), "holders in the dump");
            for (uint32_t at = start; at < dump.set_ends[set]; at++, holder++)
                must(dump.members[at] == (holder->first << 3 | holder->second), "holders in the dump");
        }
    }

    radix::Tree tree_;
    Model model_;
    std::set<uint32_t> misled_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    for (size_t i = 0; printing && i < size; i++) std::printf("%02x", data[i]);
    if (printing) std::printf("\n");
    Stream stream(forest, data, size);
    const uint8_t head = stream.byte();
    Pair pair(CAPS[head % 4], head / 4);
    for (size_t done = 1; !stream.ended(); done++) {
        const uint8_t operation = stream.byte() % 16;
        uint32_t worker = 0;
        if (operation < 6) {
            for (const Change &change : stream.changes(worker, stream.byte())) pair.change(worker, change);
        } else if (operation < 8) {
            std::vector<Change> batch;
            const uint8_t what = stream.byte();
            for (int i = stream.byte() % 6; i > 0; i--)
                for (Change &change : stream.changes(worker, (stream.byte() & 0xf8) | (what & 7)))
                    batch.push_back(std::move(change));
            pair.apply(WORKERS[what & 7], batch);
        } else if (operation < 13) {
            pair.match(stream.query());
        } else if (operation == 13) {
            std::vector<Hashes> queries;
            for (int i = stream.byte() % 4; i >= 0; i--) queries.push_back(stream.query());
            const size_t repeats = stream.byte();
            pair.match_many(queries, queries.size() + (repeats < 240 ? repeats % 16 : repeats * 8));
        } else if (operation == 14) {
            const uint8_t which = stream.byte();
            pair.look_at(which < 8 ? Forest::unknown(which) : stream.block());
        } else {
            pair.look();
        }
        if (done % 32 == 0 && !printing) pair.look();
        if (printing) std::printf("\n");
    }
    pair.look();
    if (printing) std::printf("\nend\n");
    return 0;
}
