// fibers.h: stacks to run functions on, and the switch from one to another.
#pragma once

#include <cstddef>

namespace cuda_on_host {

constexpr size_t kStack = 128 * 1024;  // bytes

struct Stack {
  char* bottom;  // its lowest address
  size_t size;
  void* pointer;  // where it was left
};

// A stack of kStack bytes, below which lies a page that cannot be touched.
Stack new_stack();

// The next switch to `stack` calls `run`, which must never return.
void prepare(Stack& stack, void (*run)());

// To be called first by what `prepare` is given.
void arrive_first();

// Leaves the stack that is in use, until something switches back to it.
void switch_stacks(Stack& from, const Stack& to);

// The same, from the stack of the CPU thread that runs all this; `from` then describes it.
void leave_main_stack(Stack& from, const Stack& to);

}  // namespace cuda_on_host
