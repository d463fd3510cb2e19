#include "thread_pool.hpp"

#include <chrono>

#include "futex.hpp"

namespace sk {
namespace {

// How long a thread spins for the next run before it sleeps. Between two steps of an engine there
// is Python for 0.1 to 0.5 ms; waking a sleeper costs some 10 us, spinning takes the CPU from
// others.
constexpr auto kSpin = std::chrono::microseconds(50);

}  // namespace

ThreadPool::ThreadPool(uint32_t threads) : threads_(threads), done_(threads) {
  workers_.reserve(threads - 1);
  try {
    for (uint32_t index = 1; index < threads; ++index) {
      workers_.emplace_back([this, index] { work(index); });
    }
  } catch (...) {
    stop_ = true;
    announce();
    for (std::thread& worker : workers_) worker.join();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  announce();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(void (*function)(void*, uint32_t), void* context) {
  function_ = function;
  context_ = context;
  if (threads_ > 1) announce();
  function(context, 0);
  done_.arrive_and_wait([] {});
}

void ThreadPool::announce() {
  // Both sequentially consistent, as in wait_for: either a sleeper sees the new round or it is
  // seen.
  round_.fetch_add(1);
  if (sleepers_.load() != 0) wake_all(&round_);
}

void ThreadPool::work(uint32_t index) {
  for (uint32_t seen = 0;; ++seen) {
    if (!wait_for(seen)) return;
    function_(context_, index);
    done_.arrive_and_wait([] {});
  }
}

// Until a round after `seen` begins; false: the pool ends.
bool ThreadPool::wait_for(uint32_t seen) {
  const auto begin = std::chrono::steady_clock::now();
  uint32_t spins = 0;
  while (round_.load(std::memory_order_acquire) == seen) {
    if (++spins % 64 != 0 || std::chrono::steady_clock::now() - begin < kSpin) {
      relax();
      continue;
    }
    sleepers_.fetch_add(1);
    while (round_.load() == seen) sleep_while(&round_, seen);
    sleepers_.fetch_sub(1);
  }
  return !stop_;
}

}  // namespace sk
