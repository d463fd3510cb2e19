// The read ceiling of the machine: threads that cycle over a buffer with the widest loads there
// are, and nothing else.
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "error.hpp"
#include "isa.hpp"
#include "mapped_buffer.hpp"
#include "read_sum.hpp"
#include "spin_barrier.hpp"

namespace sk {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kBlock = SK_READ_PROBE_BLOCK_BYTES;
constexpr size_t kLine = 64;

double seconds_between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

ReadSum read_sum_for(sk_isa isa) {
#if defined(__x86_64__)
  if (isa == SK_ISA_AVX512 || isa == SK_ISA_AMX) return read_sum_avx512;
  if (isa == SK_ISA_AVX2) return read_sum_avx2;
#endif
  (void)isa;
  return read_sum_portable;
}

// Memory that can be filled without swapping or killing a process; UINT64_MAX where the kernel
// does not say.
uint64_t available_memory() {
  std::FILE* file = std::fopen("/proc/meminfo", "re");
  if (file == nullptr) return UINT64_MAX;
  char line[256];
  uint64_t kibibytes = UINT64_MAX / 1024;
  while (std::fgets(line, sizeof(line), file) != nullptr) {
    if (std::sscanf(line, "MemAvailable: %" SCNu64 " kB", &kibibytes) == 1) break;
  }
  std::fclose(file);
  return kibibytes * 1024;
}

int32_t check_buffer(const sk_read_probe_args& args) {
  const uint64_t smallest = uint64_t{args.threads} * kBlock;
  if (args.buffer_bytes < smallest || args.buffer_bytes > SK_READ_PROBE_MAX_BUFFER_BYTES) {
    return fail(
        SK_STATUS_BAD_SIZE,
        "buffer_bytes is %" PRIu64 "; for %" PRIu32 " threads it can be %" PRIu64 " to %" PRIu64,
        args.buffer_bytes, args.threads, smallest, uint64_t{SK_READ_PROBE_MAX_BUFFER_BYTES});
  }
  const uint64_t available = available_memory();
  if (args.buffer_bytes > available) {
    return fail(SK_STATUS_OUT_OF_MEMORY,
                "buffer_bytes is %" PRIu64 ", but this machine has %" PRIu64
                " bytes of memory available",
                args.buffer_bytes, available);
  }
  return SK_STATUS_OK;
}

int32_t check_args(const sk_read_probe_args& args) {
  if (args.threads < 1 || args.threads > SK_MAX_THREADS) {
    return fail(SK_STATUS_BAD_SIZE, "threads is %" PRIu32 "; it can be 1 to %d", args.threads,
                SK_MAX_THREADS);
  }
  if (args.pass_bytes > SK_READ_PROBE_MAX_BUFFER_BYTES) {
    return fail(SK_STATUS_BAD_SIZE, "pass_bytes is %" PRIu64 "; it can be 0 to %" PRIu64,
                args.pass_bytes, uint64_t{SK_READ_PROBE_MAX_BUFFER_BYTES});
  }
  if (args.max_passes > SK_READ_PROBE_MAX_PASSES) {
    return fail(SK_STATUS_BAD_SIZE, "max_passes is %" PRIu32 "; it can be 0 to %d", args.max_passes,
                SK_READ_PROBE_MAX_PASSES);
  }
  // Written so that NaN is refused too.
  if (!(args.seconds > 0 && args.seconds <= SK_READ_PROBE_MAX_SECONDS)) {
    return fail(SK_STATUS_BAD_VALUE, "seconds is %g; it must be above 0 and at most %d",
                args.seconds, SK_READ_PROBE_MAX_SECONDS);
  }
  if (args.reserved != 0) {
    return fail(SK_STATUS_BAD_VALUE, "reserved is %" PRIu32 "; it must be 0", args.reserved);
  }
  return check_buffer(args);
}

// The CPUs to pin `threads` threads to, one each; empty if the calling thread may not use so many.
std::vector<int> cpus_to_pin(uint32_t threads) {
  cpu_set_t allowed;
  // Fails on a machine of more CPUs than cpu_set_t holds: then nothing is pinned.
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return {};
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE && cpus.size() < threads; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
  }
  if (cpus.size() < threads) cpus.clear();
  return cpus;
}

bool pin_this_thread(int cpu) {
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(cpu, &only);
  return pthread_setaffinity_np(pthread_self(), sizeof(only), &only) == 0;
}

// What the threads of one probe share.
class Probe {
 public:
  Probe(const sk_read_probe_args& args, sk_isa isa, unsigned char* buffer)
      : read_sum_(read_sum_for(isa)),
        buffer_(buffer),
        threads_(args.threads),
        share_blocks_(args.buffer_bytes / kBlock / args.threads),
        pass_blocks_(pass_blocks(args)),
        max_passes_(args.max_passes ? args.max_passes : SK_READ_PROBE_MAX_PASSES),
        time_limit_(args.seconds),
        cpus_(cpus_to_pin(args.threads)),
        pinned_(!cpus_.empty()),
        barrier_(args.threads) {
    // No allocation while the clock runs.
    pass_seconds_.reserve(max_passes_);
  }

  // Starts the threads, lets them read, joins them. Throws std::system_error if a thread cannot be
  // started; the others are then sent home first.
  void run() {
    std::vector<std::thread> workers;
    workers.reserve(threads_);
    try {
      for (uint32_t index = 0; index < threads_; ++index) {
        workers.emplace_back([this, index] { work(index); });
      }
    } catch (...) {
      open_gate(false);
      for (std::thread& worker : workers) worker.join();
      throw;
    }
    open_gate(true);
    for (std::thread& worker : workers) worker.join();
  }

  bool read_everything() const { return read_everything_; }

  void report(Clock::time_point begin, sk_read_probe_result* result) {
    const double pass_bytes = static_cast<double>(pass_blocks_ * kBlock * threads_);
    result->buffer_bytes = share_blocks_ * kBlock * threads_;
    result->bytes_read = pass_blocks_ * kBlock * threads_ * pass_seconds_.size();
    result->seconds = 0;
    for (double seconds : pass_seconds_) result->seconds += seconds;
    result->setup_seconds = seconds_between(begin, first_pass_);
    std::sort(pass_seconds_.begin(), pass_seconds_.end());
    const size_t passes = pass_seconds_.size();
    const double median = (pass_seconds_[(passes - 1) / 2] + pass_seconds_[passes / 2]) / 2;
    result->median_gb_per_s = pass_bytes / median / 1e9;
    result->best_gb_per_s = pass_bytes / pass_seconds_.front() / 1e9;
    result->passes = static_cast<uint32_t>(passes);
    result->threads = threads_;
    result->pinned = pinned_ ? 1 : 0;
  }

 private:
  static uint64_t pass_blocks(const sk_read_probe_args& args) {
    const uint64_t bytes = args.pass_bytes ? args.pass_bytes : SK_READ_PROBE_DEFAULT_PASS_BYTES;
    return std::max<uint64_t>(1, bytes / kBlock / args.threads);
  }

  void open_gate(bool go) {
    const std::lock_guard<std::mutex> lock(gate_mutex_);
    gate_ = go ? Gate::kGo : Gate::kGoHome;
    gate_changed_.notify_all();
  }

  bool wait_at_gate() {
    std::unique_lock<std::mutex> lock(gate_mutex_);
    gate_changed_.wait(lock, [this] { return gate_ != Gate::kClosed; });
    return gate_ == Gate::kGo;
  }

  void work(uint32_t index) {
    if (!wait_at_gate()) return;
    // Before the first write, which decides the NUMA node that the memory comes from.
    if (!cpus_.empty() && !pin_this_thread(cpus_[index])) pinned_ = false;
    unsigned char* share = buffer_ + index * share_blocks_ * kBlock;
    fill(share);
    barrier_.arrive_and_wait([this] { first_pass_ = pass_begin_ = Clock::now(); });
    uint64_t position = 0;
    while (!stop_) {
      if (!read_pass(share, &position)) read_everything_ = false;
      barrier_.arrive_and_wait([this] { end_pass(); });
    }
  }

  // Writes to each cache line: pages that were never written to would all be one page of zeros in
  // the cache. The sum of a share's words is then its number of lines.
  void fill(unsigned char* share) const {
    for (size_t offset = 0; offset < share_blocks_ * kBlock; offset += kLine) {
      *reinterpret_cast<uint64_t*>(share + offset) = 1;
    }
  }

  // Goes on where the last pass ended. False if the sum says that words were left out.
  bool read_pass(const unsigned char* share, uint64_t* position) const {
    uint64_t sum = 0;
    for (uint64_t left = pass_blocks_; left > 0;) {
      const uint64_t blocks = std::min(left, share_blocks_ - *position);
      sum += read_sum_(share + *position * kBlock, blocks * kBlock);
      *position = (*position + blocks) % share_blocks_;
      left -= blocks;
    }
    return sum == pass_blocks_ * (kBlock / kLine);
  }

  void end_pass() {
    const Clock::time_point now = Clock::now();
    pass_seconds_.push_back(seconds_between(pass_begin_, now));
    pass_begin_ = now;
    stop_ = pass_seconds_.size() >= max_passes_ || seconds_between(first_pass_, now) >= time_limit_;
  }

  enum class Gate { kClosed, kGo, kGoHome };

  const ReadSum read_sum_;
  unsigned char* const buffer_;
  const uint32_t threads_;
  const uint64_t share_blocks_;  // of the buffer, for each thread
  const uint64_t pass_blocks_;   // that each thread reads in a pass
  const uint32_t max_passes_;
  const double time_limit_;
  const std::vector<int> cpus_;
  std::atomic<bool> pinned_;
  std::atomic<bool> read_everything_{true};

  std::mutex gate_mutex_;
  std::condition_variable gate_changed_;
  Gate gate_ = Gate::kClosed;

  // Written only by the thread that completes the barrier, which orders it before all others.
  SpinBarrier barrier_;
  std::vector<double> pass_seconds_;
  Clock::time_point first_pass_;
  Clock::time_point pass_begin_;
  bool stop_ = false;
};

int32_t read_probe(const sk_read_probe_args& args, sk_read_probe_result* result) {
  if (const int32_t status = check_args(args)) return status;
  sk_isa isa;
  if (const int32_t status = resolve_isa(args.isa, &isa)) return status;
  const Clock::time_point begin = Clock::now();
  const MappedBuffer buffer(args.buffer_bytes);
  if (buffer.data() == nullptr) {
    return fail(SK_STATUS_OUT_OF_MEMORY, "the kernel refused buffer_bytes = %" PRIu64,
                args.buffer_bytes);
  }
  Probe probe(args, isa, buffer.data());
  probe.run();
  if (!probe.read_everything()) {
    return fail(SK_STATUS_INTERNAL, "the sum of the words read is wrong (isa level %d)", isa);
  }
  probe.report(begin, result);
  result->isa = isa;
  result->huge_pages = buffer.huge_pages() ? 1 : 0;
  result->reserved = 0;
  return SK_STATUS_OK;
}

}  // namespace
}  // namespace sk

int32_t sk_read_probe(const sk_read_probe_args* args, sk_read_probe_result* result) {
  if (const int32_t status = sk::check_struct(args, "sk_read_probe_args")) return status;
  if (const int32_t status = sk::check_struct(result, "sk_read_probe_result")) return status;
  try {
    return sk::read_probe(*args, result);
  } catch (const std::bad_alloc&) {
    return sk::fail(SK_STATUS_OUT_OF_MEMORY, "no memory to start %" PRIu32 " threads",
                    args->threads);
  } catch (const std::system_error& error) {
    return sk::fail(SK_STATUS_OUT_OF_MEMORY, "cannot start %" PRIu32 " threads: %s", args->threads,
                    error.what());
  } catch (const std::exception& error) {
    return sk::fail(SK_STATUS_INTERNAL, "%s", error.what());
  }
}
