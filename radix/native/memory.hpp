// Memory that grows and shrinks in place.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

namespace radix {

#define RADIX_INLINE __attribute__((always_inline)) inline
#ifndef RADIX_SHRINK  // by how much a fuzzer makes pieces smaller: a power of two, at most 512
#define RADIX_SHRINK 1
#endif

// An array of zeros over reserved address space: addresses never change, nothing is copied as it fills up, and pages
// cost memory only once they are written to.
template <class T> class Region {
  public:
    explicit Region(size_t capacity) : bytes_((capacity * sizeof(T) + PAGE - 1) / PAGE * PAGE) {
        mapped_ = mmap(nullptr, bytes_ + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped_ == MAP_FAILED) throw std::bad_alloc();
        char *const at = static_cast<char *>(mapped_) + (-reinterpret_cast<uintptr_t>(mapped_) & (HUGE - 1));
        items_ = reinterpret_cast<T *>(at);
#ifdef MADV_HUGEPAGE
        // Probes are random: with small pages each would miss the TLB, too. Small trees stay small.
        if (bytes_ > HUGE) madvise(at + HUGE, bytes_ - HUGE, MADV_HUGEPAGE);
#endif
    }
    ~Region() { munmap(mapped_, bytes_ + HUGE); }
    Region(const Region &) = delete;
    Region &operator=(const Region &) = delete;

    T &operator[](size_t i) { return items_[i]; }
    const T &operator[](size_t i) const { return items_[i]; }
    // Whether items below `end` have their pages; `commit` sees to it. The first touch of a page may take milliseconds,
    // which nobody should have to wait for.
    bool committed(size_t end) const { return std::min(end * sizeof(T), bytes_) <= committed_; }
    void commit(size_t end) {
        for (; !committed(end); committed_ += PAGE) __atomic_fetch_or(bytes() + committed_, 0, __ATOMIC_RELAXED);
    }
    // Give whole huge pages among items [from, to) back; they are zeros then.
    void release(size_t from, size_t to) {
        const size_t start = (from * sizeof(T) + HUGE - 1) / HUGE * HUGE;
        const size_t end = std::min(to * sizeof(T), bytes_) / HUGE * HUGE;
        if (start >= end) return;
        madvise(bytes() + start, end - start, MADV_DONTNEED);
        committed_ = std::min(committed_, start);
    }
    void trim(size_t size) {  // the same for all items from `size` on, once it is worth a call
        if (size * sizeof(T) + HUGE < committed_) release(size, bytes_ / sizeof(T));
    }

  private:
    static constexpr size_t PAGE = 4096, HUGE = (2 << 20) / RADIX_SHRINK;
    char *bytes() { return reinterpret_cast<char *>(items_); }
    void *mapped_;
    T *items_;  // at the start of a huge page
    size_t bytes_, committed_ = 0;
};

}  // namespace radix
