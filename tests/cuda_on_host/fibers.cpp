// fibers.cpp: see fibers.h
#include "fibers.h"

#include <sys/mman.h>

#include <new>

extern "C" {
void __attribute__((weak)) __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __attribute__((weak)) __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);

// Pushes the callee-saved registers on the stack that is left and pops them from the stack that is entered; no system
// call.
void cuda_on_host_switch(void** leave, void* enter);
}

#if defined(__x86_64__)
asm(R"(
.local cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#endif

namespace cuda_on_host {
namespace {

constexpr size_t kGuard = 4096;

Stack* main_stack = nullptr;  // set while switching away from the main stack

// Tells AddressSanitizer, where it is active, which stack is in use now.
void arrive(void* fake_stack) {
  const void* bottom = nullptr;
  size_t size = 0;
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
  if (main_stack) *main_stack = {static_cast<char*>(const_cast<void*>(bottom)), size, main_stack->pointer};
  main_stack = nullptr;
}

}  // namespace

Stack new_stack() {
  constexpr int kProtection = PROT_READ | PROT_WRITE, kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const p = mmap(nullptr, kGuard + kStack, kProtection, kFlags, -1, 0);
  if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
  return {static_cast<char*>(p) + kGuard, kStack, nullptr};
}

void prepare(Stack& stack, void (*run)()) {
  void** top = reinterpret_cast<void**>(stack.bottom + stack.size);
  *--top = nullptr;  // the return address of `run`, which never returns
  *--top = reinterpret_cast<void*>(run);
  stack.pointer = top - 6;  // the first switch to this stack then starts `run`
}

void arrive_first() { arrive(nullptr); }

void switch_stacks(Stack& from, const Stack& to) {
  void* fake_stack = nullptr;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&fake_stack, to.bottom, to.size);
  cuda_on_host_switch(&from.pointer, to.pointer);
  arrive(fake_stack);
}

void leave_main_stack(Stack& from, const Stack& to) {
  main_stack = &from;
  switch_stacks(from, to);
}

}  // namespace cuda_on_host
