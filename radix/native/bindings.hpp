// What the bindings share: NumPy arrays in and out without conversions, through NumPy's own C API (an argument costs
// about 10 ns; a generic buffer or DLPack costs hundreds).
#pragma once
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL rhizome_radix_numpy
#ifndef RADIX_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <nanobind/nanobind.h>
#include <numpy/arrayobject.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>

namespace radix {

namespace nb = nanobind;

void bind_hashing(nb::module_ &module);
void bind_tree(nb::module_ &module);
void bind_events(nb::module_ &module);
void bind_held(nb::module_ &module);
void bind_prediction(nb::module_ &module);
void bind_blocks(nb::module_ &module);

inline std::string text_of(nb::object value) {
    const nb::object text = nb::steal(PyObject_Str(value.ptr()));
    if (!text.is_valid()) throw nb::python_error();
    return PyUnicode_AsUTF8(text.ptr());
}

inline void check_range(const char *field, int64_t value, int64_t least, uint64_t most) {
    if (value < least || static_cast<uint64_t>(value) > most)
        throw nb::value_error((std::string(field) + " is " + std::to_string(value) + ": " + std::to_string(least) +
                               " to " + std::to_string(most) + " are allowed").c_str());
}

inline uint64_t check_hash(const char *field, nb::handle value) {  // any integer, NumPy's too
    const nb::object number = nb::steal(PyNumber_Index(value.ptr()));
    if (!number.is_valid()) throw nb::python_error();
    const uint64_t hash = PyLong_AsUnsignedLongLong(number.ptr());
    if (hash != ~uint64_t(0) || !PyErr_Occurred()) return hash;
    PyErr_Clear();
    throw nb::value_error((std::string(field) + " is " + text_of(number) + ": 0 to 2^64 - 1 are allowed").c_str());
}

inline void check_stored(const char *field, const uint64_t *hashes, size_t count) {
    if (std::find(hashes, hashes + count, uint64_t(0)) != hashes + count)
        throw nb::value_error((std::string(field) + " hold 0: it stands for the root, a block has another").c_str());
}

// A 1-D C-contiguous array of T, borrowed from Python for the length of a call (strided ones are copied).
template <class T> class ArrayArgument {
  public:
    // `what` names the expected array in the TypeError, as in "a one-dimensional array of uint64".
    ArrayArgument(nb::handle value, const char *field, const char *what) {
        auto *array = reinterpret_cast<PyArrayObject *>(value.ptr());
        if (!PyArray_Check(value.ptr()) || PyArray_NDIM(array) != 1 || PyArray_ITEMSIZE(array) != sizeof(T) ||
            !PyTypeNum_ISUNSIGNED(PyArray_TYPE(array)) || PyArray_ISBYTESWAPPED(array)) {
            const std::string shown = PyArray_Check(value.ptr())
                                          ? text_of(value.attr("dtype")) + " " + text_of(value.attr("shape"))
                                          : Py_TYPE(value.ptr())->tp_name;
            throw nb::type_error((std::string(field) + " is " + shown + ": " + what + " is needed").c_str());
        }
        if (PyArray_IS_C_CONTIGUOUS(array) && PyArray_ISALIGNED(array)) owner_ = nb::borrow(value);
        else owner_ = nb::steal(PyArray_FromArray(array, nullptr, NPY_ARRAY_CARRAY_RO));
        if (!owner_.is_valid()) throw nb::python_error();
        data_ = static_cast<const T *>(PyArray_DATA(reinterpret_cast<PyArrayObject *>(owner_.ptr())));
        size_ = static_cast<size_t>(PyArray_SIZE(reinterpret_cast<PyArrayObject *>(owner_.ptr())));
    }
    const T *data() const { return data_; }
    size_t size() const { return size_; }
    std::span<const T> span() const { return {data_, size_}; }

  private:
    nb::object owner_;
    const T *data_;
    size_t size_;
};

// A fresh array of the given shape and NumPy type; `*data` is where to write.
template <class T> nb::object new_array(std::initializer_list<npy_intp> shape, int type, T **data) {
    PyObject *array = PyArray_SimpleNew(static_cast<int>(shape.size()), const_cast<npy_intp *>(shape.begin()), type);
    if (!array) throw nb::python_error();
    *data = static_cast<T *>(PyArray_DATA(reinterpret_cast<PyArrayObject *>(array)));
    return nb::steal(array);
}

}  // namespace radix
