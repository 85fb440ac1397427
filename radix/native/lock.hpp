// Many readers, or one writer that lets them in between its steps.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <mutex>

namespace radix {

// The rule: readers run beside each other. Writers take turns (`turn`); the one whose turn it is shuts readers out for
// steps of microseconds. Readers that wait come in before the next step. A thread that has one lock takes no other.
class TreeLock {
  public:
    std::mutex turn;

    void lock_shared() {
        if (enter()) return;
        waiting_.fetch_add(1, std::memory_order_relaxed);
        for (int tries = 0; !enter(); tries++) pause(tries);
        waiting_.fetch_sub(1, std::memory_order_relaxed);
    }
    void unlock_shared() { state_.fetch_sub(1, std::memory_order_release); }
    void lock() {  // in one's turn
        state_.fetch_or(WRITER, std::memory_order_acquire);
        for (int tries = 0; state_.load(std::memory_order_acquire) != WRITER; tries++) pause(tries);
    }
    void unlock() { state_.store(0, std::memory_order_release); }
    void let_in() const {  // between two steps
        for (int tries = 0; waiting_.load(std::memory_order_relaxed) && tries < 1000; tries++) pause(tries);
    }

  private:
    static constexpr uint32_t WRITER = 1u << 31;
    bool enter() {
        uint32_t state = state_.load(std::memory_order_relaxed);
        while (!(state & WRITER))
            if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) return true;
        return false;
    }
    static void pause(int tries) {  // spin shortly: steps are short, but the other thread may have lost its core
        if (tries > 100) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
    std::atomic<uint32_t> state_{0};  // readers inside; WRITER: one is inside, or waits for them to leave
    std::atomic<uint32_t> waiting_{0};
};

}  // namespace radix
