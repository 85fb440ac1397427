// radix._native.NativeTree. Short calls keep the GIL: letting it go costs more than they do.
#include <algorithm>
#include <random>

#include "bindings.hpp"
#include "tree.hpp"

namespace radix {

namespace {

constexpr size_t LONG = 4096;  // blocks; calls with as many let other Python threads run
constexpr const char *HASHES = "a one-dimensional array of uint64";
using HashesArgument = ArrayArgument<uint64_t>;

uint32_t check_worker(int64_t worker) {
    check_range("worker", worker, 0, MAX_WORKERS - 1);
    return static_cast<uint32_t>(worker);
}

template <class T> nb::object to_array(const T *from, size_t count) {
    T *data;
    nb::object array = new_array({static_cast<npy_intp>(count)}, sizeof(T) == 8 ? NPY_UINT64 : NPY_UINT32, &data);
    std::copy_n(from, count, data);
    return array;
}
template <class T> nb::object to_array(const std::vector<T> &from) { return to_array(from.data(), from.size()); }

// A writer's turn. A thread that has to wait for it lets the GIL go: the other one may need it to finish.
template <class Act> auto write(Tree &tree, size_t blocks, Act act) {
    std::unique_lock<std::mutex> turn(tree.turn(), std::try_to_lock);
    if (turn.owns_lock() && blocks < LONG && tree.committed(blocks)) return act();
    nb::gil_scoped_release released;
    if (!turn.owns_lock()) turn.lock();
    return act();
}

size_t size_of(const Changes &changes) {  // in blocks; a clear may be of any number
    const bool clears = std::ranges::find(changes.kinds, CLEAR) != changes.kinds.end();
    return clears ? LONG : changes.hashes.size();
}

class Columns {  // of Python changes, all checked
  public:
    explicit Columns(nb::handle value)
        : kinds_(value.attr("kinds"), "kinds", BYTES), tiers_(value.attr("tiers"), "tiers", BYTES),
          parents_(value.attr("parents"), "parents", HASHES),
          ends_(value.attr("ends"), "ends", "a one-dimensional array of uint32"),
          hashes_(value.attr("hashes"), "hashes", HASHES),
          changes{kinds_.span(), tiers_.span(), parents_.span(), ends_.span(), hashes_.span()} {
        const size_t rows = changes.kinds.size();
        if (changes.tiers.size() != rows || changes.parents.size() != rows || changes.ends.size() != rows)
            throw nb::value_error("kinds, tiers, parents and ends differ in length");
        size_t start = 0;
        for (size_t i = 0; i < rows; start = changes.ends[i++]) {
            check_range("kind", changes.kinds[i], STORE, CLEAR);
            check_range("tier", changes.tiers[i], 0, TIERS - 1);
            check_range("end", changes.ends[i], static_cast<int64_t>(start), changes.hashes.size());
            if (changes.kinds[i] == STORE) check_stored("hashes", changes.hashes.data() + start, changes.ends[i] - start);
        }
        if (start != changes.hashes.size()) throw nb::value_error("hashes go on after the last end");
    }

  private:
    static constexpr const char *BYTES = "a one-dimensional array of uint8";
    const ArrayArgument<uint8_t> kinds_, tiers_;
    const HashesArgument parents_;
    const ArrayArgument<uint32_t> ends_;
    const HashesArgument hashes_;

  public:
    const Changes changes;
};

nb::object as_dict(const Matched &matched) {
    nb::object dict = nb::steal(PyDict_New());
    const uint32_t *depths = matched.depths(TIERS - 1);
    nb::object depth;  // neighbours often have the same
    for (size_t i = 0; i < matched.count; i++) {
        if (!i || depths[i] != depths[i - 1]) depth = nb::steal(PyLong_FromUnsignedLong(depths[i]));
        const nb::object worker = nb::steal(PyLong_FromUnsignedLong(matched.rows[i]));
        if (PyDict_SetItem(dict.ptr(), worker.ptr(), depth.ptr())) throw nb::python_error();
    }
    return dict;
}

nb::object by_worker(const Matched &matched, int64_t workers) {
    check_range("workers", workers, 0, MAX_WORKERS);
    double *data;
    nb::object array = new_array({2, static_cast<npy_intp>(workers)}, NPY_FLOAT64, &data);
    std::fill_n(data, 2 * workers, 0.0);
    for (size_t i = 0; i < matched.count && matched.rows[i] < workers; i++) {  // ascending
        data[matched.rows[i]] = matched.depths(0)[i];
        data[workers + matched.rows[i]] = matched.depths(TIERS - 1)[i];
    }
    return array;
}

struct ManyMatched {
    std::vector<Matched> matches;

    // The rows of all queries in one array: workers (row -1), or depths within a tier.
    nb::object column(int tier) const {
        size_t count = 0;
        for (const Matched &matched : matches) count += matched.count;
        uint32_t *data;
        nb::object array = new_array({static_cast<npy_intp>(count)}, NPY_UINT32, &data);
        for (const Matched &matched : matches) data = std::copy_n(matched.depths(tier), matched.count, data);
        return array;
    }
    nb::object ends() const {
        uint32_t *data, end = 0;
        nb::object array = new_array({static_cast<npy_intp>(matches.size())}, NPY_UINT32, &data);
        for (const Matched &matched : matches) *data++ = end += static_cast<uint32_t>(matched.count);
        return array;
    }
};

ManyMatched match_many(const Tree &tree, nb::sequence queries) {
    std::vector<HashesArgument> arguments;
    std::vector<Hashes> hashes;
    arguments.reserve(nb::len(queries));
    for (nb::handle query : queries) hashes.push_back(arguments.emplace_back(query, "hashes", HASHES).span());
    ManyMatched many{std::vector<Matched>(hashes.size())};
    nb::gil_scoped_release released;
    tree.match_many(hashes, many.matches.data());
    return many;
}

Tree *make_tree(int64_t max_blocks, int64_t max_blocks_per_worker, nb::object seed) {
    check_range("max_blocks", max_blocks, 1, LARGEST_MAX_BLOCKS);
    check_range("max_blocks_per_worker", max_blocks_per_worker, 1, LARGEST_MAX_BLOCKS);
    std::random_device random;
    const uint64_t drawn = uint64_t(random()) << 32 | random();
    return new Tree(max_blocks, max_blocks_per_worker, seed.is_none() ? drawn : check_hash("seed", seed));
}

}  // namespace

void bind_tree(nb::module_ &module) {
    nb::class_<Matched>(module, "Matches")
        .def_prop_ro("workers", [](const Matched &m) { return to_array(m.rows.data(), m.count); })
        .def_prop_ro("depths", [](const Matched &m) { return to_array(m.depths(TIERS - 1), m.count); })
        .def_prop_ro("tier_depths", [](const Matched &m) {
            uint32_t *data;
            nb::object array = new_array({TIERS, static_cast<npy_intp>(m.count)}, NPY_UINT32, &data);
            std::copy_n(m.depths(0), TIERS * m.count, data);
            return array;
        })
        .def("by_worker", &by_worker, nb::arg("workers"))
        .def("as_dict", &as_dict)
        .def("__len__", [](const Matched &m) { return m.count; });

    nb::class_<ManyMatched>(module, "ManyMatches")
        .def_prop_ro("ends", &ManyMatched::ends)
        .def_prop_ro("workers", [](const ManyMatched &many) { return many.column(-1); })
        .def_prop_ro("depths", [](const ManyMatched &many) { return many.column(TIERS - 1); })
        .def("__len__", [](const ManyMatched &many) { return many.matches.size(); })
        .def("__getitem__", [](const ManyMatched &many, Py_ssize_t at) {
            if (at < 0) at += static_cast<Py_ssize_t>(many.matches.size());
            if (at < 0 || static_cast<size_t>(at) >= many.matches.size()) throw nb::index_error();
            return many.matches[at];
        }, nb::arg("index"))
        .def("__iter__", [](nb::handle many) { return nb::steal(PySeqIter_New(many.ptr())); });

    nb::class_<Tree>(module, "NativeTree")
        .def(nb::new_(&make_tree), nb::arg("max_blocks") = DEFAULT_MAX_BLOCKS,
             nb::arg("max_blocks_per_worker") = DEFAULT_MAX_BLOCKS_PER_WORKER, nb::arg("seed") = nb::none())
        .def("store", [](Tree &tree, int64_t worker, nb::handle hashes, nb::handle parent, int64_t tier) {
            const uint32_t number = check_worker(worker);
            const uint64_t above = check_hash("parent", parent);
            const HashesArgument blocks(hashes, "hashes", HASHES);
            check_range("tier", tier, 0, TIERS - 1);
            check_stored("hashes", blocks.data(), blocks.size());
            return write(tree, blocks.size(), [&] {
                return tree.store(number, blocks.data(), blocks.size(), above, static_cast<int>(tier));
            });
        }, nb::arg("worker"), nb::arg("hashes"), nb::arg("parent") = ROOT_HASH, nb::arg("tier") = 0)
        .def("remove", [](Tree &tree, int64_t worker, nb::handle hashes, int64_t tier) {
            const uint32_t number = check_worker(worker);
            const HashesArgument blocks(hashes, "hashes", HASHES);
            check_range("tier", tier, 0, TIERS - 1);
            return write(tree, blocks.size(), [&] {
                return tree.remove(number, blocks.data(), blocks.size(), static_cast<int>(tier));
            });
        }, nb::arg("worker"), nb::arg("hashes"), nb::arg("tier") = 0)
        .def("clear", [](Tree &tree, int64_t worker) {
            const uint32_t number = check_worker(worker);
            return write(tree, tree.count(number) ? LONG : 0, [&] { return tree.clear(number); });
        }, nb::arg("worker"))
        .def("apply", [](Tree &tree, int64_t worker, const Changes &changes) {
            const uint32_t number = check_worker(worker);
            write(tree, size_of(changes), [&] { return tree.apply(number, changes); });
        }, nb::arg("worker"), nb::arg("changes"))
        .def("apply", [](Tree &tree, int64_t worker, nb::object columns) {
            const uint32_t number = check_worker(worker);
            const Columns checked(columns);
            write(tree, size_of(checked.changes), [&] { return tree.apply(number, checked.changes); });
        }, nb::arg("worker"), nb::arg("changes"))
        .def("match", [](const Tree &tree, nb::handle hashes) {
            const HashesArgument blocks(hashes, "hashes", HASHES);
            return tree.match(blocks.span());
        }, nb::arg("hashes"))
        .def("match_many", &match_many, nb::arg("queries"))
        .def("digest", [](const Tree &tree, int64_t worker) {
            const Digest digest = tree.digest(check_worker(worker));
            return nb::bytes(digest.data(), sizeof digest);
        }, nb::arg("worker"))
        .def("blocks", [](Tree &tree, int64_t worker) {
            const uint32_t number = check_worker(worker);
            return to_array(write(tree, LONG, [&] { return tree.blocks(number); }));
        }, nb::arg("worker"))
        .def("count", [](const Tree &tree, int64_t worker) { return tree.count(check_worker(worker)); },
             nb::arg("worker"))
        .def("refused", [](const Tree &tree, int64_t worker) { return tree.refused(check_worker(worker)); },
             nb::arg("worker"))
        .def("room", [](const Tree &tree, int64_t worker) { return tree.room(check_worker(worker)); },
             nb::arg("worker"))
        .def("__len__", &Tree::size)
        .def("holders", [](const Tree &tree, nb::handle hash) {
            return to_array(tree.holders(check_hash("block_hash", hash)));
        }, nb::arg("block_hash"))
        .def("children", [](Tree &tree, nb::handle hash) {
            const uint64_t parent = check_hash("block_hash", hash);
            return to_array(write(tree, parent == ROOT_HASH ? LONG : 0, [&] { return tree.children(parent); }));
        }, nb::arg("block_hash"))
        .def("hottest", [](Tree &tree, int64_t limit) {
            check_range("limit", limit, 0, HEAT_WINDOW);
            nb::list records;
            nb::dict parents;
            const Heat heat = write(tree, LONG, [&] { return tree.heat(); });
            for (const uint64_t record : heat.records) records.append(record);
            for (const auto &[block, parent] : heat.parents) parents[nb::int_(block)] = parent;
            return nb::module_::import_("radix.heat").attr("hottest")(records, parents, limit);
        }, nb::arg("limit"))
        .def("dump", [](Tree &tree) {
            const Dumped all = write(tree, LONG, [&] { return tree.dump(); });
            return nb::module_::import_("radix.tree").attr("Dump")(
                to_array(all.hashes), to_array(all.parents), to_array(all.holder_sets), to_array(all.set_ends),
                to_array(all.members));
        })
        .def("check", [](Tree &tree) {
            try {
                write(tree, LONG, [&] { return tree.check(); });
            } catch (const std::logic_error &error) {
                PyErr_SetString(PyExc_AssertionError, error.what());
                throw nb::python_error();
            }
        });
}

}  // namespace radix
