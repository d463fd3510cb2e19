#include "scratch.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "description.hpp"

namespace sk {

Scratch::~Scratch() { std::free(data_); }

void* Scratch::get(size_t bytes) {
  if (bytes <= bytes_) return data_;
  std::free(data_);
  data_ = nullptr;
  bytes_ = 0;
  constexpr size_t kHugePage = 2 << 20;
  const size_t page = bytes < kHugePage ? 4096 : kHugePage, rounded = round_up(bytes, page);
  data_ = std::aligned_alloc(page, rounded);
  if (data_ == nullptr) throw std::bad_alloc();
  // What does not get them works as well, but slower.
  if (page == kHugePage) madvise(data_, rounded, MADV_HUGEPAGE);
  std::memset(data_, 0, rounded);
  bytes_ = rounded;
  return data_;
}

}  // namespace sk
