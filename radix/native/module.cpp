// radix._native: see README.md beside this file.
#define RADIX_IMPORTS_NUMPY
#include "bindings.hpp"

NB_MODULE(_native, module) {
    if (_import_array() < 0) throw nanobind::python_error();
    nanobind::set_leak_warnings(false);  // whatever lives at exit, as in a kept traceback, would be called a leak
    radix::bind_hashing(module);
    radix::bind_tree(module);
    radix::bind_events(module);
    radix::bind_held(module);
    radix::bind_prediction(module);
    radix::bind_blocks(module);
}
