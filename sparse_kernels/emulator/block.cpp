#include "block.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <unordered_set>
#include <vector>

#include "fiber.hpp"

namespace sk {
namespace emulator {

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStackBytes = 128 << 10;

enum class State { kRuns, kWaitsForWarp, kWaitsForBlock, kDone };

struct Lane {
  Fiber fiber;
  State state = State::kDone;
  Act act = nullptr;
  void* own = nullptr;
};

struct Warp {
  uint32_t waiting = 0;
};

// The block that runs.
struct Block {
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  uint32_t current = 0;
  Body body = nullptr;
  const void* args = nullptr;
  const char* name = "";
  std::string fault;  // the first
};
Block block;
Context scheduler;

struct Counts {
  Traffic traffic = {};
  std::unordered_set<uintptr_t> sectors;  // of the block that runs
};
std::map<std::string, Counts> counts;
Counts* counting = nullptr;
bool counting_sectors = false;

std::map<std::string, Kernel>& kernels() {
  static auto* all = new std::map<std::string, Kernel>();
  return *all;
}

// By the first byte.
std::map<uintptr_t, size_t>& memory() {
  static auto* all = new std::map<uintptr_t, size_t>();
  return *all;
}
uintptr_t last_begin = 0, last_end = 0;  // the piece that was found last

// Before and after each piece: what no kernel may change.
constexpr size_t kFence = 256;
constexpr uint8_t kFenceByte = 0xa5;

void check_fences(const char* name) {
  static const std::vector<uint8_t> whole(2 * kFence, kFenceByte);
  for (const auto& piece : memory()) {
    const auto* data = reinterpret_cast<const uint8_t*>(piece.first);
    if (std::memcmp(data - kFence, whole.data(), kFence) == 0 &&
        std::memcmp(data + piece.second, whole.data(), kFence) == 0) {
      continue;
    }
    throw Fault(std::string(name) + ": writes beside a piece of memory of " +
                std::to_string(piece.second) + " bytes");
  }
}

void set_indices() { threadIdx.x = block.current; }

void switch_out() { switch_context(&block.lanes[block.current].fiber.context, &scheduler); }

// A lane that did wrong waits for ever; the launch ends.
[[noreturn]] void stop(const std::string& what) {
  if (block.fault.empty()) {
    block.fault = std::string(block.name) + ", block " + std::to_string(blockIdx.x) + " " +
                  std::to_string(blockIdx.y) + " " + std::to_string(blockIdx.z) + ", thread " +
                  std::to_string(block.current) + ": " + what;
  }
  block.lanes[block.current].state = State::kDone;
  for (;;) switch_out();
}

void run_lane() {
  block.body(block.args);
  block.lanes[block.current].state = State::kDone;
  switch_out();
}

void run_warp(uint32_t warp) {
  const uint32_t first = warp * 32;
  for (bool again = true; again;) {
    again = false;
    for (uint32_t i = first; i < first + 32 && block.fault.empty(); ++i) {
      if (block.lanes[i].state != State::kRuns) continue;
      block.current = i;
      set_indices();
      switch_context(&scheduler, &block.lanes[i].fiber.context);
      again = true;
    }
  }
}

const char* name_of(State state) {
  switch (state) {
    case State::kRuns:
      return "running";
    case State::kWaitsForWarp:
      return "waiting for its warp";
    case State::kWaitsForBlock:
      return "waiting for its block";
    case State::kDone:
      return "at its end";
  }
  return "";
}

void run_block(uint32_t threads) {
  for (uint32_t i = 0; i < threads; ++i) {
    block.lanes[i].state = State::kRuns;
    block.lanes[i].fiber.start(kStackBytes, run_lane);
  }
  for (Warp& warp : block.warps) warp.waiting = 0;
  for (;;) {
    for (uint32_t warp = 0; warp < threads / 32; ++warp) run_warp(warp);
    if (!block.fault.empty()) throw Fault(block.fault);
    uint32_t waiting = 0, done = 0;
    for (uint32_t i = 0; i < threads; ++i) {
      waiting += block.lanes[i].state == State::kWaitsForBlock;
      done += block.lanes[i].state == State::kDone;
    }
    if (done == threads) return;
    if (waiting != threads) {
      std::string text = std::string(block.name) +
                         ": threads of a block do not meet: thread 0 is " +
                         name_of(block.lanes[0].state);
      for (uint32_t i = 1; i < threads; ++i) {
        if (block.lanes[i].state != block.lanes[0].state) {
          text += ", thread " + std::to_string(i) + " " + name_of(block.lanes[i].state);
          break;
        }
      }
      throw Fault(text);
    }
    for (uint32_t i = 0; i < threads; ++i) block.lanes[i].state = State::kRuns;
  }
}

void end_counting_block() {
  if (counting == nullptr) return;
  counting->traffic.once_sectors += counting->sectors.size();
  counting->sectors.clear();
}

}  // namespace

Registration::Registration(const char* name, Body body, size_t args_bytes) {
  kernels()[name] = {body, args_bytes};
}

const Kernel* find_kernel(const std::string& name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : &found->second;
}

void launch(const Kernel& kernel, const char* name, Dim3 grid, uint32_t threads, const void* args) {
  block.lanes.resize(threads);
  block.warps.resize(threads / 32);
  block.body = kernel.body;
  block.args = args;
  block.name = name;
  block.fault.clear();
  counting = &counts[name];
  gridDim = grid;
  blockDim = {threads, 1, 1};
  for (uint32_t z = 0; z < grid.z; ++z) {
    for (uint32_t y = 0; y < grid.y; ++y) {
      for (uint32_t x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(threads);
        end_counting_block();
      }
    }
  }
  check_fences(name);
}

static size_t mapped_bytes(size_t bytes) {
  return (bytes + kFence - 1) / kFence * kFence + 2 * kFence;
}

void* allocate(size_t bytes) {
  const size_t whole = mapped_bytes(bytes);
  // Zero pages that nobody touches take no memory: a device may be larger than the host.
  void* pages = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  auto* fenced = static_cast<uint8_t*>(pages);
  uint8_t* data = fenced + kFence;
  std::memset(fenced, kFenceByte, kFence);
  std::memset(data + bytes, kFenceByte, whole - kFence - bytes);
  memory()[reinterpret_cast<uintptr_t>(data)] = bytes;
  return data;
}

void release(void* data) {
  const auto piece = memory().find(reinterpret_cast<uintptr_t>(data));
  munmap(static_cast<uint8_t*>(data) - kFence, mapped_bytes(piece->second));
  memory().erase(piece);
  last_begin = last_end = 0;
}

bool is_allocated(const void* at, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(at);
  const auto after = memory().upper_bound(address);
  if (after == memory().begin()) return false;
  const auto& piece = *std::prev(after);
  return address + bytes <= piece.first + piece.second;
}

void check_access(const void* at, size_t bytes, Access access) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(at);
  if (address % bytes != 0) {
    stop("reads " + std::to_string(bytes) + " bytes at an address that is not aligned to them");
  }
  if (address < last_begin || address + bytes > last_end) {
    const auto after = memory().upper_bound(address);
    if (after == memory().begin()) stop("reads outside the device's memory");
    const auto& piece = *std::prev(after);
    if (address + bytes > piece.first + piece.second) {
      stop("reads " + std::to_string(address + bytes - piece.first - piece.second) +
           " bytes beyond the end of a piece of memory of " + std::to_string(piece.second));
    }
    last_begin = piece.first;
    last_end = piece.first + piece.second;
  }
  if (access == Access::kShared) {
    counting->traffic.shared_bytes += bytes;
    return;
  }
  counting->traffic.once_bytes += bytes;
  if (counting_sectors) counting->sectors.insert(address / 32);
}

void wait_for_block() {
  block.lanes[block.current].state = State::kWaitsForBlock;
  switch_out();
}

void collective(Act act, void* own) {
  const uint32_t lane = block.current, first = lane / 32 * 32;
  Warp& warp = block.warps[lane / 32];
  Lane& self = block.lanes[lane];
  self.act = act;
  self.own = own;
  if (++warp.waiting < 32) {
    self.state = State::kWaitsForWarp;
    switch_out();
    return;
  }
  warp.waiting = 0;
  void* all[32];
  for (uint32_t i = 0; i < 32; ++i) {
    Lane& other = block.lanes[first + i];
    if (other.act != act) stop("lanes of its warp are at different places");
    all[i] = other.own;
  }
  if (act != nullptr) act(all);
  for (uint32_t i = 0; i < 32; ++i) block.lanes[first + i].state = State::kRuns;
}

void reset_traffic(bool count_sectors) {
  counts.clear();
  counting = nullptr;
  counting_sectors = count_sectors;
}

Traffic traffic_of(const std::string& name) {
  const auto found = counts.find(name);
  return found == counts.end() ? Traffic{} : found->second.traffic;
}

}  // namespace emulator
}  // namespace sk
