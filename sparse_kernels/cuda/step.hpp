// What the host brings of a pass, in one piece of memory that is copied at once.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "model.hpp"

namespace sk {
namespace cuda {

// Host bytes beside where they will stand on the device.
class Step {
 public:
  explicit Step(Model& model) : model_(model) {}

  // -> the place of a copy of them, by its offset.
  template <typename T>
  size_t add(const T* data, size_t count) {
    constexpr size_t kAlignment = 16;
    const size_t at = (bytes_.size() + kAlignment - 1) / kAlignment * kAlignment;
    bytes_.resize(at + count * sizeof(T));
    if (count != 0) std::memcpy(bytes_.data() + at, data, count * sizeof(T));
    return at;
  }
  template <typename T>
  size_t add(const std::vector<T>& data) {
    return add(data.data(), data.size());
  }
  // Where what was added will stand, if it all has room: reserve() comes first.
  template <typename T>
  const T* at(size_t offset) const {
    return reinterpret_cast<const T*>(model_.step.data() + offset);
  }
  template <typename T>
  T* edit(size_t offset) {
    return reinterpret_cast<T*>(bytes_.data() + offset);
  }
  // Grows by doubling: graphs know where it stands.
  int32_t reserve() {
    const size_t there = model_.step.bytes();
    if (bytes_.size() <= there) return SK_STATUS_OK;
    return model_.step.reserve(std::max(bytes_.size(), 2 * there));
  }
  int32_t send() {
    if (const int32_t failed = model_.staging.reserve(bytes_.size())) return failed;
    std::memcpy(model_.staging.data(), bytes_.data(), bytes_.size());
    return copy_in(model_.device, model_.stream, model_.step.data(), model_.staging.data(),
                   bytes_.size());
  }

 private:
  Model& model_;
  std::vector<uint8_t> bytes_;
};

}  // namespace cuda
}  // namespace sk
