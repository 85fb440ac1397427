#include "bindings.hpp"

namespace radix {

void bind_tree(nb::module_ &) {}

}  // namespace radix
