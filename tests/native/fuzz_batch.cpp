// libFuzzer: bytes of event batches, and what comes out of them put into a tree. `make fuzz` runs it.
#include <sanitizer/allocator_interface.h>

#include <cstdio>
#include <cstdlib>

#include "radix/native/batch_reader.hpp"
#include "radix/native/tree.hpp"

namespace {

size_t allocated = 0;  // bytes since it was set to 0, given back or not

void count_allocation(const volatile void *, size_t size) { allocated += size; }
void ignore(const volatile void *) {}
const int hooked = __sanitizer_install_malloc_and_free_hooks(count_allocation, ignore);

void must(bool holds, const char *what) {
    if (holds) return;
    std::fprintf(stderr, "what was read is no batch: %s\n", what);
    std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    must(hooked, "allocations cannot be counted");
    radix::Batch batch;
    allocated = 0;
    const bool read = radix::BatchReader::read(data, size, batch);
    // An event takes 2 bytes at least and becomes 14, a hash 1 byte and becomes 8; columns grow by doubling.
    must(allocated <= 1024 + 64 * size, "it takes too much memory");
    if (!read) return 0;

    const size_t events = batch.kinds.size();
    must(batch.tiers.size() == events && batch.parents.size() == events && batch.ends.size() == events, "columns");
    size_t start = 0;
    for (size_t i = 0; i < events; start = batch.ends[i++]) {
        must(batch.kinds[i] <= radix::CLEAR && batch.tiers[i] < radix::TIERS, "an event");
        must(start <= batch.ends[i] && batch.ends[i] <= batch.hashes.size(), "its end");
    }
    must(start == batch.hashes.size(), "the last end");
    for (const uint64_t hash : batch.hashes) must(hash != radix::ROOT_HASH, "a hash");
    must(!batch.worker.empty() && batch.epoch > 0, "whose it is");

    radix::Tree tree(4096, 4096, 0);
    tree.apply(0, batch);
    tree.check();
    return 0;
}
