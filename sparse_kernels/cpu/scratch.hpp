// Memory for what is computed.
#pragma once

#include <cstddef>

namespace sk {

// Memory that only grows, aligned and zeroed when it does.
class Scratch {
 public:
  ~Scratch();
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // Throws std::bad_alloc. What was in it is lost when it grows.
  void* get(size_t bytes);
  template <typename T>
  T* get(size_t count) {
    return static_cast<T*>(get(count * sizeof(T)));
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace sk
