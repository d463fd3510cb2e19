// Memory of a device that ends with its owner.
#pragma once

#include <utility>

#include "driver.hpp"

namespace sk {
namespace cuda {

// Device or pinned host memory; empty at first.
template <int32_t (*kAllocate)(uint32_t, size_t, void**), void (*kRelease)(uint32_t, void*)>
class Memory {
 public:
  explicit Memory(uint32_t device) : device_(device) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { release(); }

  // At least so many bytes; what was in it is lost where it grows.
  int32_t reserve(size_t bytes) {
    if (bytes <= bytes_) return SK_STATUS_OK;
    release();
    if (const int32_t failed = kAllocate(device_, bytes, &data_)) return failed;
    bytes_ = bytes;
    return SK_STATUS_OK;
  }
  uint8_t* data() const { return static_cast<uint8_t*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void release() {
    if (data_ != nullptr) kRelease(device_, std::exchange(data_, nullptr));
    bytes_ = 0;
  }

  uint32_t device_;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

using DeviceMemory = Memory<allocate, release>;
using PinnedMemory = Memory<allocate_pinned, release_pinned>;

// Pieces one after another, each aligned for any load; without memory they are only counted.
class Pieces {
 public:
  explicit Pieces(uint8_t* base) : base_(base) {}

  template <typename T>
  T* take(size_t count) {
    constexpr size_t kAlignment = 256;
    T* at = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

}  // namespace cuda
}  // namespace sk
