// Anonymous memory on huge pages where the kernel grants them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace sk {

class MappedBuffer {
 public:
  // On failure data() is null. The memory costs nothing until it is written to.
  explicit MappedBuffer(size_t bytes) : mapped_bytes_(bytes + kHugePage) {
    void* address =
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) return;
    mapping_ = address;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
    data_ = static_cast<unsigned char*>(address) + (aligned - begin);
    huge_pages_ = madvise(data_, bytes, MADV_HUGEPAGE) == 0;
  }
  ~MappedBuffer() {
    if (mapping_ != nullptr) munmap(mapping_, mapped_bytes_);
  }
  MappedBuffer(const MappedBuffer&) = delete;
  MappedBuffer& operator=(const MappedBuffer&) = delete;

  unsigned char* data() const { return data_; }
  // Whether the kernel took the advice; it may still grant ordinary pages.
  bool huge_pages() const { return huge_pages_; }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;
  size_t mapped_bytes_;
  void* mapping_ = nullptr;
  unsigned char* data_ = nullptr;
  bool huge_pages_ = false;
};

}  // namespace sk
