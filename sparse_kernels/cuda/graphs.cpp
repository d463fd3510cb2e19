#include "graphs.hpp"

#include <algorithm>
#include <cstring>

namespace sk {
namespace cuda {

Graphs::Kept& Graphs::find(const StepKey& key) {
  const auto numbers = key.numbers();
  const auto found = std::find_if(kept_.begin(), kept_.end(),
                                  [&](const Kept& kept) { return kept.key == numbers; });
  if (found != kept_.end()) {
    kept_.splice(kept_.begin(), kept_, found);
    return kept_.front();
  }
  if (kept_.size() == kMost) {
    if (kept_.back().graph != nullptr) release_graph(device_, kept_.back().graph);
    kept_.pop_back();
  }
  kept_.emplace_front();
  kept_.front().key = numbers;
  return kept_.front();
}

int32_t Graphs::launch_kept(uint64_t stream, const Kept& kept) {
  SK_TRY(launch_graph(device_, stream, kept.graph));
  ++launches_;
  return SK_STATUS_OK;
}

void Graphs::give_up() {
  why_not_ = sk_last_error();
  on_ = false;
  clear();
}

void Graphs::clear() {
  for (const Kept& kept : kept_) {
    if (kept.graph != nullptr) release_graph(device_, kept.graph);
  }
  kept_.clear();
}

void Graphs::tell(sk_graphs_info* info) const {
  const auto has_graph = [](const Kept& kept) { return kept.graph != nullptr; };
  info->captures = captures_;
  info->launches = launches_;
  info->kept = static_cast<uint32_t>(std::count_if(kept_.begin(), kept_.end(), has_graph));
  info->reserved = 0;
  std::memset(info->why_not, 0, sizeof(info->why_not));
  std::memcpy(info->why_not, why_not_.data(), std::min(why_not_.size(), sizeof(info->why_not) - 1));
}

}  // namespace cuda
}  // namespace sk
