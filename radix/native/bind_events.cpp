// radix._native.decode_batch: event batches from their bytes, as columns.
#include "batch_reader.hpp"
#include "bindings.hpp"

namespace radix {

namespace {

constexpr size_t LONG_BYTES = 1 << 16;  // a payload above takes 10 us and more: time to let other threads run

nb::handle batch_type;

// None where only the decoder in Python knows what it is.
nb::object decode_batch(nb::handle payload) {
    if (!PyBytes_CheckExact(payload.ptr())) return nb::none();
    const auto *data = reinterpret_cast<const uint8_t *>(PyBytes_AS_STRING(payload.ptr()));
    const auto size = static_cast<size_t>(PyBytes_GET_SIZE(payload.ptr()));
    nb::object made = nb::inst_alloc(batch_type);
    Batch &batch = *new (nb::inst_ptr<Batch>(made)) Batch;
    nb::inst_mark_ready(made);
    bool common;
    if (size < LONG_BYTES) {
        common = BatchReader::read(data, size, batch);
    } else {
        nb::gil_scoped_release others_run;
        common = BatchReader::read(data, size, batch);
    }
    return common ? made : nb::none();
}

// A read-only array over a column of `owner`, which it keeps alive.
template <class T> nb::object column(nb::handle_t<Changes> owner, std::span<const T> Changes::*member) {
    const std::span<const T> values = nb::inst_ptr<Changes>(owner)->*member;
    const int type = sizeof(T) == 1 ? NPY_UINT8 : sizeof(T) == 4 ? NPY_UINT32 : NPY_UINT64;
    npy_intp size = static_cast<npy_intp>(values.size());
    nb::object array = nb::steal(PyArray_New(&PyArray_Type, 1, &size, type, nullptr, const_cast<T *>(values.data()), 0,
                                             NPY_ARRAY_CARRAY_RO, nullptr));
    if (!array.is_valid() ||
        PyArray_SetBaseObject(reinterpret_cast<PyArrayObject *>(array.ptr()), owner.inc_ref().ptr()) < 0)
        throw nb::python_error();
    return array;
}

}  // namespace

void bind_events(nb::module_ &module) {
    using Columns = nb::handle_t<Changes>;
    nb::class_<Changes>(module, "Changes")
        .def_prop_ro("kinds", [](Columns self) { return column(self, &Changes::kinds); })
        .def_prop_ro("tiers", [](Columns self) { return column(self, &Changes::tiers); })
        .def_prop_ro("parents", [](Columns self) { return column(self, &Changes::parents); })
        .def_prop_ro("ends", [](Columns self) { return column(self, &Changes::ends); })
        .def_prop_ro("hashes", [](Columns self) { return column(self, &Changes::hashes); });
    nb::class_<Batch, Changes> batch(module, "Batch");
    batch.def_prop_ro("worker", [](const Batch &self) { return nb::str(self.worker.data(), self.worker.size()); })
        .def_ro("epoch", &Batch::epoch)
        .def_ro("seq", &Batch::seq)
        .def_ro("ts", &Batch::ts)
        .def_prop_ro("digest", [](const Batch &self) { return nb::bytes(self.digest.data(), self.digest.size()); })
        .def_prop_ro("header", [](const Batch &self) {  // all of these at once
            return nb::make_tuple(nb::str(self.worker.data(), self.worker.size()), self.epoch, self.seq,
                                  nb::bytes(self.digest.data(), self.digest.size()), self.ts);
        });
    batch_type = batch;
    module.def("decode_batch", decode_batch);
}

}  // namespace radix
