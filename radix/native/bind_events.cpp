#include "bindings.hpp"

namespace radix {

void bind_events(nb::module_ &) {}

}  // namespace radix
