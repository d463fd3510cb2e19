#include "fiber.hpp"

namespace sk {
namespace emulator {

#if defined(__x86_64__)

constexpr size_t kPlaces = 61, kPlaceBytes = 704;

asm(R"(
.text
.globl sk_switch_stacks
.type sk_switch_stacks, @function
sk_switch_stacks:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret
.size sk_switch_stacks, .-sk_switch_stacks
)");

void Fiber::start(size_t stack_bytes, void (*entry)()) {
  if (stack == nullptr) stack.reset(new uint8_t[stack_bytes]);
  // Stacks are whole pages apart: tops at one place in a page would compete for a few lines of the
  // cache.
  const size_t place = reinterpret_cast<uintptr_t>(this) / sizeof(*this) % kPlaces * kPlaceBytes;
  // At the entry of a function the stack is 8 bytes off a multiple of 16.
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack.get()) + stack_bytes - place) / 16 * 16;
  void** at = reinterpret_cast<void**>(top);
  *--at = nullptr;  // where nobody returns to
  *--at = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--at = nullptr;
  context.stack = at;
}

#else

void Fiber::start(size_t stack_bytes, void (*entry)()) {
  if (stack == nullptr) stack.reset(new uint8_t[stack_bytes]);
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack.get();
  context.context.uc_stack.ss_size = stack_bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

#endif

}  // namespace emulator
}  // namespace sk
