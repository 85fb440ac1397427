#include "bindings.hpp"

namespace radix {

void bind_hashing(nb::module_ &) {}

}  // namespace radix
