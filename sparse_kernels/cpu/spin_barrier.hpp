// A barrier that costs well under a microsecond when each thread has a CPU.
#pragma once

#include <atomic>
#include <cstdint>

#include "futex.hpp"

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
      // Both sequentially consistent: either a sleeper sees the new round or it is seen.
      round_.store(round + 1);
      if (sleepers_.load() != 0) wake_all(&round_);
      return;
    }
    for (uint32_t spins = 0; spins < kSpins; ++spins) {
      if (round_.load(std::memory_order_acquire) != round) return;
      idle();
      relax();
    }
    // The one waited for may have no CPU, because others are busy: one that falls idle takes it
    // over at once, one that is merely yielded does not.
    sleepers_.fetch_add(1);
    while (round_.load() == round) sleep_while(&round_, round);
    sleepers_.fetch_sub(1);
  }

 private:
  static constexpr uint32_t kSpins =
      1024;  // some 50 us, longer than most waits where all have a CPU

  const uint32_t threads_;
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint32_t> sleepers_{0};
};

}  // namespace sk
