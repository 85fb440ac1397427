// KV blocks on their way from pool to pool: copied, with their XXH3-64 digests taken on the way (worker.transfer.digests
// has the same in Python). A pool is an array of bytes [planes, blocks, piece]: a block is its pieces, one after another.
#include "bindings.hpp"
#include "xxh3.hpp"

namespace radix {
namespace {

class Pool {
  public:
    Pool(nb::handle value, const char *field, bool written) {
        auto *array = reinterpret_cast<PyArrayObject *>(value.ptr());
        if (!PyArray_Check(value.ptr()) || PyArray_TYPE(array) != NPY_UINT8 || PyArray_NDIM(array) != 3 ||
            !(written ? PyArray_ISCARRAY(array) : PyArray_ISCARRAY_RO(array)))
            throw nb::type_error((std::string(field) + ": a C-contiguous array of uint8 with 3 dimensions" +
                                  (written ? ", writable," : "") + " is needed").c_str());
        data = static_cast<uint8_t *>(PyArray_DATA(array));
        planes = static_cast<size_t>(PyArray_DIM(array, 0));
        blocks = static_cast<size_t>(PyArray_DIM(array, 1));
        piece_bytes = static_cast<size_t>(PyArray_DIM(array, 2));
        if (piece_bytes % xxh3::STRIPE || planes * piece_bytes < xxh3::LEAST_BYTES)
            throw nb::value_error((std::string(field) + " has " + std::to_string(planes) + " pieces of " +
                                   std::to_string(piece_bytes) + " bytes: multiples of 64, 256 in all").c_str());
    }
    uint8_t *piece(size_t plane, size_t block) const { return data + (plane * blocks + block) * piece_bytes; }
    void check(const char *field, std::span<const uint32_t> numbers) const {
        for (const uint32_t number : numbers) check_range(field, number, 0, blocks - 1);
    }

    uint8_t *data;
    size_t planes, blocks, piece_bytes;
};

// The digest of one block, copied into `slot` of `into` unless that is null.
template <class State> uint64_t one_block(const Pool &from, uint32_t block, const Pool *into, uint32_t slot) {
    State state;
    const size_t stripes = from.piece_bytes / xxh3::STRIPE, last = from.planes - 1;
    for (size_t plane = 0; plane < last; plane++)
        state.stripes(from.piece(plane, block), stripes, into ? into->piece(plane, slot) : nullptr);
    uint8_t *to = into ? into->piece(last, slot) : nullptr;
    const size_t before = (stripes - 1) * xxh3::STRIPE;
    state.stripes(from.piece(last, block), stripes - 1, to);
    return state.finish(from.piece(last, block) + before, to ? to + before : nullptr, from.planes * from.piece_bytes);
}

bool has_avx2() {
#ifdef RADIX_XXH3_AVX2
    static const bool has = __builtin_cpu_supports("avx2");
    return has;
#else
    return false;
#endif
}

nb::object block_digests(nb::handle pool, nb::handle blocks) {
    const Pool from(pool, "pool", false);
    const ArrayArgument<uint32_t> numbers(blocks, "blocks", "a one-dimensional array of uint32");
    from.check("blocks", numbers.span());
    uint64_t *digests;
    nb::object result = new_array({static_cast<npy_intp>(numbers.size())}, NPY_UINT64, &digests);
    nb::gil_scoped_release released;
    for (const uint32_t block : numbers.span()) {
#ifdef RADIX_XXH3_AVX2
        if (has_avx2()) {
            *digests++ = one_block<xxh3::Avx2>(from, block, nullptr, 0);
            continue;
        }
#endif
        *digests++ = one_block<xxh3::Portable>(from, block, nullptr, 0);
    }
    return result;
}

void copy_one(const Pool &from, uint32_t block, const Pool &into, uint32_t slot, bool streamed) {
    for (size_t plane = 0; plane < from.planes; plane++) {
#ifdef RADIX_XXH3_AVX2
        if (streamed) {
            xxh3::Avx2::copy(from.piece(plane, block), from.piece_bytes / xxh3::STRIPE, into.piece(plane, slot));
            continue;
        }
#endif
        std::memcpy(into.piece(plane, slot), from.piece(plane, block), from.piece_bytes);
    }
    (void)streamed;
}

nb::object copy_blocks(nb::handle into_pool, nb::handle slots, nb::handle pool, nb::handle blocks, bool digest) {
    const Pool into(into_pool, "into", true), from(pool, "pool", false);
    if (into.planes != from.planes || into.piece_bytes != from.piece_bytes)
        throw nb::value_error("the pools' blocks have other pieces");
    const ArrayArgument<uint32_t> here(slots, "slots", "a one-dimensional array of uint32");
    const ArrayArgument<uint32_t> there(blocks, "blocks", "a one-dimensional array of uint32");
    if (here.size() != there.size()) throw nb::value_error("there are not as many slots as blocks");
    into.check("slots", here.span());
    from.check("blocks", there.span());
    uint64_t *digests;
    nb::object result = new_array({static_cast<npy_intp>(here.size())}, NPY_UINT64, &digests);
    const bool streamed = has_avx2() && reinterpret_cast<uintptr_t>(into.data) % 32 == 0;
    nb::gil_scoped_release released;
    for (size_t i = 0; i < here.size(); i++) {
        if (!digest) {
            copy_one(from, there.data()[i], into, here.data()[i], streamed);
            digests[i] = 0;
            continue;
        }
#ifdef RADIX_XXH3_AVX2
        if (streamed) {
            digests[i] = one_block<xxh3::Avx2>(from, there.data()[i], &into, here.data()[i]);
            continue;
        }
#endif
        digests[i] = one_block<xxh3::Portable>(from, there.data()[i], &into, here.data()[i]);
    }
#ifdef RADIX_XXH3_AVX2
    _mm_sfence();
#endif
    return result;
}

}  // namespace

void bind_blocks(nb::module_ &module) {
    module.def("block_digests", &block_digests, nb::arg("pool"), nb::arg("blocks"));
    module.def("copy_blocks", &copy_blocks, nb::arg("into"), nb::arg("slots"), nb::arg("pool"), nb::arg("blocks"),
               nb::arg("digest") = true);
}

}  // namespace radix
