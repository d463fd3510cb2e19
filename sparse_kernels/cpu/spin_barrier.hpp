// A barrier that costs well under a microsecond when each thread has a CPU.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

namespace sk {

class SpinBarrier {
 public:
  explicit SpinBarrier(uint32_t threads) : threads_(threads) {}

  // Returns when all threads have arrived and the last one to arrive has run `completion`, whose
  // writes all of them then see.
  template <typename Completion>
  void arrive_and_wait(Completion&& completion) {
    arrive_and_wait(completion, [] {});
  }
  // Those that wait call idle() again and again; it takes less than a microsecond.
  template <typename Completion, typename Idle>
  void arrive_and_wait(Completion&& completion, Idle&& idle) {
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      completion();
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    // With more threads than CPUs the one waited for needs this CPU: give it up after a while.
    for (uint32_t spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < 4096) {
        idle();
        relax();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  const uint32_t threads_;
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace sk
