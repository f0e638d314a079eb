// fibers.h: separate stacks to run functions on, and switching between them.
#pragma once

#include <cstddef>

namespace cuda_on_host {

constexpr size_t kStack = 128 * 1024;  // bytes

struct Stack {
  char* bottom;  // lowest address
  size_t size;
  void* pointer;  // the saved stack pointer
};

// Allocates a stack of kStack bytes with a guard page below it.
Stack new_stack();

// Makes the next switch to `stack` call `run`, which must not return.
void prepare(Stack& stack, void (*run)());

// Must be the first call in the function given to `prepare`.
void arrive_first();

// Switches from one stack to another; returns when something switches back.
void switch_stacks(Stack& from, const Stack& to);

// The same, but from the CPU thread's own stack, which `from` is set to describe.
void leave_main_stack(Stack& from, const Stack& to);

}  // namespace cuda_on_host
