// Memory for what is computed.
#pragma once

#include <cstddef>

namespace sk {

// So many bytes or some more, which `bytes` then says: aligned to pages, huge ones where that is
// worth it; for std::free. Not zeroed: nothing is touched. Throws std::bad_alloc.
void* allocate_pages(size_t* bytes);

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
