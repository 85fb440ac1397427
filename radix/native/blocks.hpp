// A pool of KV blocks as an array of bytes [planes, blocks, piece]: a block is its pieces, one after another.
#pragma once
#include "bindings.hpp"
#include "xxh3.hpp"

namespace radix {

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

inline bool has_avx2() {
#ifdef RADIX_XXH3_AVX2
    static const bool has = __builtin_cpu_supports("avx2");
    return has;
#else
    return false;
#endif
}

}  // namespace radix
