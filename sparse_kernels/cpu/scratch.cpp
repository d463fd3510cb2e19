#include "scratch.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "description.hpp"

namespace sk {

void* allocate_pages(size_t* bytes) {
  constexpr size_t kHugePage = 2 << 20;
  const size_t page = *bytes < kHugePage ? 4096 : kHugePage, rounded = round_up(*bytes, page);
  void* const data = std::aligned_alloc(page, rounded);
  if (data == nullptr) throw std::bad_alloc();
  // What does not get them works as well, but slower.
  if (page == kHugePage) madvise(data, rounded, MADV_HUGEPAGE);
  *bytes = rounded;
  return data;
}

Scratch::~Scratch() { std::free(data_); }

void* Scratch::get(size_t bytes) {
  if (bytes <= bytes_) return data_;
  std::free(data_);
  data_ = nullptr;
  bytes_ = 0;
  data_ = allocate_pages(&bytes);
  std::memset(data_, 0, bytes);
  bytes_ = bytes;
  return data_;
}

}  // namespace sk
