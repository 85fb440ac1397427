// The bindings of the block hash: which kernel this machine runs, and tokens from lists without NumPy.
#include "bindings.hpp"
#include "siphash.hpp"

namespace radix {
namespace {

constexpr size_t LONG_CALL_BLOCKS = 1000;  // about 20 us: from here on other threads may run meanwhile

template <size_t LANES>
RADIX_INLINE inline void chain_any(const uint32_t *tokens, size_t blocks, size_t block_size, SipKey key, SipKey parent,
                                   uint64_t *out) {
    if (block_size == 16) chain_keys<LANES, 16>(tokens, blocks, block_size, key, parent, out);
    else chain_keys<LANES, 0>(tokens, blocks, block_size, key, parent, out);
}

using ChainKeys = decltype(chain_any<2>);

void chain_baseline(const uint32_t *tokens, size_t blocks, size_t block_size, SipKey key, SipKey parent,
                    uint64_t *out) {
    chain_any<2>(tokens, blocks, block_size, key, parent, out);
}

#ifdef __x86_64__
__attribute__((target("avx2"))) void chain_avx2(const uint32_t *tokens, size_t blocks, size_t block_size, SipKey key,
                                                SipKey parent, uint64_t *out) {
    chain_any<4>(tokens, blocks, block_size, key, parent, out);
}
#endif

#if defined(__x86_64__) && !defined(__clang__)  // of which the AVX2 code is the faster one
__attribute__((target("avx512f"))) void chain_avx512(const uint32_t *tokens, size_t blocks, size_t block_size,
                                                     SipKey key, SipKey parent, uint64_t *out) {
    chain_any<8>(tokens, blocks, block_size, key, parent, out);
}
#endif

// The kernel for this machine. `widest` in lanes leaves out those that are wider: tests run them all.
ChainKeys *choose_kernel(size_t widest) {
#if defined(__x86_64__) && !defined(__clang__)
    if (widest >= 8 && __builtin_cpu_supports("avx512f")) return chain_avx512;
#endif
#ifdef __x86_64__
    if (widest >= 4 && __builtin_cpu_supports("avx2")) return chain_avx2;
#endif
    (void)widest;
    return chain_baseline;
}

SipKey parent_key(nb::handle parent) {
    if (parent.is_none()) return {0, 0};
    const ArrayArgument<uint64_t> key(parent, "parent", "a one-dimensional array of uint64");
    if (key.size() != 2) {
        const std::string shape = nb::str(nb::object(parent.attr("shape"))).c_str();
        throw nb::value_error(("parent has the shape " + shape + ": one key of shape (2,) is needed").c_str());
    }
    return {key.data()[0], key.data()[1]};
}

nb::object block_keys(nb::handle tokens, size_t block_size, uint64_t key_low, uint64_t key_high, nb::handle parent,
                      size_t lanes) {
    const ArrayArgument<uint32_t> array(tokens, "tokens", "a one-dimensional array of uint32");
    const SipKey before = parent_key(parent);
    if (block_size == 0) throw nb::value_error("block_size is 0: at least 1 token");
    const size_t blocks = array.size() / block_size;
    uint64_t *out;
    nb::object keys = new_array({static_cast<npy_intp>(blocks), 2}, NPY_UINT64, &out);
    static ChainKeys *const fastest = choose_kernel(8);
    ChainKeys *const kernel = lanes == 8 ? fastest : choose_kernel(lanes);
    if (blocks < LONG_CALL_BLOCKS) {
        kernel(array.data(), blocks, block_size, {key_low, key_high}, before, out);
    } else {
        nb::gil_scoped_release other_threads;
        kernel(array.data(), blocks, block_size, {key_low, key_high}, before, out);
    }
    return keys;
}

bool is_plain(PyObject *object) {
    auto *array = reinterpret_cast<PyArrayObject *>(object);
    return PyArray_CheckExact(object) && PyArray_TYPE(array) == NPY_UINT32 && PyArray_NDIM(array) == 1 &&
           PyArray_ISCARRAY_RO(array);
}

// Token ids as a uint32 array where that is quickly said: of such an array, and of a list or a tuple of plain ints in
// range. Anything else is None, and NumPy's to convert or to refuse.
nb::object as_tokens(nb::handle tokens) {
    if (is_plain(tokens.ptr())) return nb::borrow(tokens);
    if (!PyList_CheckExact(tokens.ptr()) && !PyTuple_CheckExact(tokens.ptr())) return nb::none();
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(tokens.ptr());
    PyObject **const items = PySequence_Fast_ITEMS(tokens.ptr());
    uint32_t *out;
    nb::object array = new_array({size}, NPY_UINT32, &out);
    for (Py_ssize_t i = 0; i < size; i++) {
        if (!PyLong_CheckExact(items[i])) return nb::none();
        int overflow;
        const long long token = PyLong_AsLongLongAndOverflow(items[i], &overflow);
        if (overflow || token < 0 || token > UINT32_MAX) return nb::none();
        out[i] = static_cast<uint32_t>(token);
    }
    return array;
}

}  // namespace

void bind_hashing(nb::module_ &module) {
    module.def("block_keys", &block_keys, nb::arg("tokens"), nb::arg("block_size"), nb::arg("key_low"),
               nb::arg("key_high"), nb::arg("parent").none() = nb::none(), nb::arg("lanes") = 8,
               "See radix.siphash.block_keys. `lanes` is the widest kernel to use.");
    module.def("as_tokens", &as_tokens, nb::arg("tokens").none(),
               "A uint32 array of plain ints, or None where NumPy must convert them.");
}

}  // namespace radix
