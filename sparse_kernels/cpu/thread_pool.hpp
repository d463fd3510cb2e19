// Threads that run one function together, many times: they spin for a while for the next one and
// then sleep, so that an idle process uses no CPU.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "spin_barrier.hpp"

namespace sk {

class ThreadPool {
 public:
  // `threads` >= 1; the caller of run() is one of them. Throws std::system_error.
  explicit ThreadPool(uint32_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  uint32_t threads() const { return threads_; }

  // Calls function(context, index) on every thread, index 0 on this one, and returns when all have
  // returned. One caller at a time.
  void run(void (*function)(void* context, uint32_t index), void* context);

 private:
  void work(uint32_t index);
  bool wait_for(uint32_t seen);
  void announce();

  const uint32_t threads_;
  SpinBarrier done_;
  void (*function_)(void*, uint32_t) = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> round_{0};  // grows with each run; sleepers wait on it
  alignas(64) std::atomic<uint32_t> sleepers_{0};
  std::vector<std::thread> workers_;
};

}  // namespace sk
