// Steps that come again, kept as CUDA graphs: all launches of such a step are one.
#pragma once

#include <array>
#include <list>
#include <string>
#include <utility>

#include "driver.hpp"
#include "error.hpp"

namespace sk {
namespace cuda {

// All that the arguments and grids of a step's launches depend on. What differs between steps of
// one key is in memory that stands where it stood.
struct StepKey {
  uint32_t rows, sequences, outputs, chunks, kv_blocks;
  bool choosing, planes, corrections;
  const void *kv, *step, *chunk_results, *results;

  std::array<uint64_t, 12> numbers() const {
    const auto address = [](const void* at) { return reinterpret_cast<uint64_t>(at); };
    return {rows,
            sequences,
            outputs,
            chunks,
            kv_blocks,
            choosing,
            planes,
            corrections,
            address(kv),
            address(step),
            address(chunk_results),
            address(results)};
  }
};

class Graphs {
 public:
  static constexpr size_t kMost = 32;

  explicit Graphs(uint32_t device) : device_(device) {}
  Graphs(const Graphs&) = delete;
  Graphs& operator=(const Graphs&) = delete;
  ~Graphs() { clear(); }

  // None is made before.
  void allow() { on_ = true; }
  bool on() const { return on_; }

  // One step, which `launches()` launches. The first of a key is launched so, which also loads its
  // kernels; the second makes a graph; it and all that follow are launches of it. Where no graph
  // can be made, no more are tried: `launches()` does without, and tell() says why.
  template <typename Launches>
  int32_t run(uint64_t stream, const StepKey& key, Launches&& launches) {
    Kept& kept = find(key);
    if (kept.graph == nullptr && !std::exchange(kept.seen, true)) return launches();
    int32_t status = SK_STATUS_OK;
    if (kept.graph == nullptr) status = capture(stream, launches, &kept.graph);
    if (status == SK_STATUS_OK) status = launch_kept(stream, kept);
    if (status == SK_STATUS_OK || status == SK_STATUS_DEVICE) return status;
    give_up();
    return launches();
  }

  void tell(sk_graphs_info* info) const;

 private:
  struct Kept {
    std::array<uint64_t, 12> key;
    bool seen = false;
    void* graph = nullptr;
  };

  template <typename Launches>
  int32_t capture(uint64_t stream, Launches&& launches, void** graph) {
    SK_TRY(begin_capture(device_, stream));
    const int32_t launched = launches();
    // Ending a capture that failed notes a failure of its own.
    const std::string why = launched == SK_STATUS_OK ? "" : sk_last_error();
    // A capture is ended in any case: a stream that captures computes nothing.
    const int32_t ended = end_capture(device_, stream, launched == SK_STATUS_OK ? graph : nullptr);
    if (launched != SK_STATUS_OK && ended != SK_STATUS_DEVICE) {
      return fail(static_cast<sk_status>(launched), "%s", why.c_str());
    }
    SK_TRY(ended);
    ++captures_;
    return SK_STATUS_OK;
  }
  int32_t launch_kept(uint64_t stream, const Kept& kept);
  // The latest first; the one that was not used for longest makes room.
  Kept& find(const StepKey& key);
  void give_up();
  void clear();

  const uint32_t device_;
  bool on_ = false;
  std::list<Kept> kept_;
  uint64_t captures_ = 0, launches_ = 0;
  std::string why_not_;
};

}  // namespace cuda
}  // namespace sk
