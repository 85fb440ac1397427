// radix._native.SetDigest and HeldBlocks.
#include <random>

#include "bindings.hpp"
#include "held.hpp"

namespace radix {

namespace {

struct Blocks : ArrayArgument<uint64_t> {
    explicit Blocks(nb::handle value, const char *field = "hashes")
        : ArrayArgument(value, field, "a one-dimensional array of uint64") {}
};

int check_tier(int64_t tier) {
    check_range("tier", tier, 0, TIERS - 1);
    return static_cast<int>(tier);
}

nb::object as_bytes(const Digest &digest) { return nb::bytes(digest.data(), sizeof digest); }

struct SetDigest {
    Digest lanes{};

    void count(nb::handle hashes, int64_t tier, bool add) {
        const Blocks blocks(hashes);
        count_digest(lanes, blocks.data(), blocks.size(), check_tier(tier), add);
    }
};

Held *make_held() {
    std::random_device random;
    return new Held(uint64_t(random()) << 32 | random());
}

void store(Held &held, nb::handle hashes, nb::handle parent, int64_t tier) {
    const Blocks blocks(hashes);
    check_stored("hashes", blocks.data(), blocks.size());
    held.store(blocks.data(), blocks.size(), check_hash("parent", parent), check_tier(tier));
}

size_t check(const Held &, nb::handle hashes) {
    const Blocks blocks(hashes, "block_hashes");
    check_stored("block_hashes", blocks.data(), blocks.size());
    return blocks.size();
}

template <class T> nb::object to_array(const std::vector<T> &from) {
    T *data;
    nb::object array = new_array({static_cast<npy_intp>(from.size())}, sizeof(T) == 8 ? NPY_UINT64 : NPY_UINT8, &data);
    std::copy(from.begin(), from.end(), data);
    return array;
}

nb::tuple columns(const Held &held) {
    Held::Columns all;
    {
        nb::gil_scoped_release others_run;
        all = held.columns();
    }
    return nb::make_tuple(to_array(all.hashes), to_array(all.parents), to_array(all.masks));
}

}  // namespace

void bind_held(nb::module_ &module) {
    nb::class_<SetDigest>(module, "SetDigest")
        .def(nb::init<>())
        .def("add", [](SetDigest &digest, nb::handle hashes, int64_t tier) { digest.count(hashes, tier, true); },
             nb::arg("hashes"), nb::arg("tier") = 0)
        .def("remove", [](SetDigest &digest, nb::handle hashes, int64_t tier) { digest.count(hashes, tier, false); },
             nb::arg("hashes"), nb::arg("tier") = 0)
        .def_prop_ro("value", [](const SetDigest &digest) { return as_bytes(digest.lanes); });

    nb::class_<Held>(module, "HeldBlocks")
        .def(nb::new_(&make_held))
        .def("store", &store, nb::arg("hashes"), nb::arg("parent") = 0, nb::arg("tier") = 0)
        .def("remove", [](Held &held, nb::handle hashes, int64_t tier) {
            const Blocks blocks(hashes);
            held.remove(blocks.data(), blocks.size(), check_tier(tier));
        }, nb::arg("hashes"), nb::arg("tier") = 0)
        .def("check", &check, nb::arg("block_hashes"))
        .def("clear", &Held::clear)
        .def("copy", [](const Held &held) { return held; })
        .def("columns", &columns)
        .def_prop_ro("digest", [](const Held &held) { return as_bytes(held.digest()); })
        .def("__len__", &Held::size);
}

}  // namespace radix
