// Threads of execution that change over by hand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sk {
namespace emulator {

#if defined(__x86_64__)

// Where a fiber goes on: all that a called function must keep is on its stack.
struct Context {
  void* stack = nullptr;
};

// Saves what the caller must keep, and goes on where `to` was left. Inline assembly would have to
// tell the compiler of every register; a function of its own need not.
extern "C" void sk_switch_stacks(void** from, void* to);

inline void switch_context(Context* from, Context* to) {
  sk_switch_stacks(&from->stack, to->stack);
}

#else

struct Context {
  ucontext_t context;
};

inline void switch_context(Context* from, Context* to) {
  swapcontext(&from->context, &to->context);
}

#endif

struct Fiber {
  Context context;
  std::unique_ptr<uint8_t[]> stack;
  // Will run `entry`, which never returns, from its beginning.
  void start(size_t stack_bytes, void (*entry)());
};

}  // namespace emulator
}  // namespace sk
