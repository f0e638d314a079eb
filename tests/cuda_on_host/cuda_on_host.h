// cuda_on_host.h: runs CUDA kernels without a GPU. Every thread of a block is a fiber; shuffles and barriers switch
// between them, in an order that CUDA_ON_HOST_SEED shuffles. A barrier that not every thread reaches is an error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

typedef void* cudaStream_t;
inline int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }

namespace cuda_on_host {

struct Index {
  unsigned x;
};

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

struct Fiber {
  void* context = nullptr;  // the stack pointer it stopped at
  std::unique_ptr<char[]> stack;
  unsigned thread = 0;
  bool done = false;
};

struct Barrier {
  unsigned arrived = 0;
  uint64_t round = 0;
};

struct Block {
  void* scheduler = nullptr;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  Index block{0}, grid{1}, threads{1};
  Barrier barrier;
  std::vector<Barrier> warps;
  bool progress = false;
  std::vector<unsigned> lanes;  // what each thread shows to its warp
  std::function<void()> kernel;
  std::mt19937 random{0};
};

inline thread_local Block* block = nullptr;

[[noreturn]] inline void fail(const char* text) {
  std::fprintf(stderr, "cuda_on_host: %s (block %u)\n", text, block->block.x);
  std::abort();
}

// Saves what a call must keep on the stack it leaves and takes it from the stack it enters: no system call.
extern "C" void cuda_on_host_switch(void** leave, void* enter);
#if defined(__x86_64__)
asm(R"(
.weak cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
#endif

inline void yield() { cuda_on_host_switch(&block->current->context, block->scheduler); }

// Waits until all `threads` of a warp or block have come here.
inline void wait(Barrier& barrier, unsigned threads) {
  const uint64_t round = barrier.round;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.round;
    block->progress = true;
    return;
  }
  while (barrier.round == round) yield();
}

inline void block_barrier() { wait(block->barrier, block->threads.x); }

inline void warp_barrier() {
  const unsigned warp = block->current->thread / kWarp;
  wait(block->warps[warp], std::min(unsigned(kWarp), block->threads.x - warp * kWarp));
}

inline unsigned shuffle(unsigned mask, unsigned value, int from_lane) {
  if (mask != 0xffffffffu) fail("a shuffle must name the whole warp");
  const unsigned thread = block->current->thread, begin = thread / kWarp * kWarp;
  block->lanes[thread] = value;
  warp_barrier();
  const unsigned result = from_lane < kWarp ? block->lanes[begin + from_lane] : value;
  warp_barrier();
  return result;
}

inline void run_fiber() {
  block->kernel();
  block->current->done = true;
  yield();
}

inline void run_block(std::vector<unsigned>& order) {
  for (Fiber& fiber : block->fibers) {
    // A stack that looks as if run_fiber had been left at its first instruction.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStack) / 16 * 16);
    *--top = nullptr;  // where run_fiber would return to, if it did
    *--top = reinterpret_cast<void*>(run_fiber);
    fiber.context = top - 6;
    fiber.done = false;
  }
  size_t left = block->fibers.size();
  while (left > 0) {
    block->progress = false;
    std::shuffle(order.begin(), order.end(), block->random);
    for (unsigned t : order) {
      Fiber& fiber = block->fibers[t];
      if (fiber.done) continue;
      block->current = &fiber;
      cuda_on_host_switch(&block->scheduler, fiber.context);
      left -= fiber.done;
      block->progress |= fiber.done;
    }
    if (!block->progress) fail("some threads wait at a barrier that others never reach");
  }
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::Index{cuda_on_host::block->current->thread})
#define blockIdx (cuda_on_host::block->block)
#define gridDim (cuda_on_host::block->grid)
#define blockDim (cuda_on_host::block->threads)

template <class T>
T atomicAdd(T* p, T x) {  // fibers take turns, so nothing comes between
  const T old = *p;
  *p += x;
  return old;
}

inline void __syncthreads() { cuda_on_host::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_on_host::warp_barrier(); }
inline unsigned __shfl_down_sync(unsigned mask, unsigned value, int by) {
  return cuda_on_host::shuffle(mask, value, int(cuda_on_host::block->current->thread % 32) + by);
}
inline unsigned __shfl_sync(unsigned mask, unsigned value, int lane) { return cuda_on_host::shuffle(mask, value, lane); }

template <class Kernel>
void run_on_host(unsigned grid, int threads, const Kernel& kernel) {
  using namespace cuda_on_host;
  Block state;
  const char* seed = std::getenv("CUDA_ON_HOST_SEED");
  state.random.seed(seed ? std::atoi(seed) : 0);
  state.kernel = kernel;
  state.grid.x = grid;
  state.threads.x = unsigned(threads);
  state.lanes.resize(threads);
  state.fibers.resize(threads);
  state.warps.resize((threads + kWarp - 1) / kWarp);
  std::vector<unsigned> order(threads);
  for (int t = 0; t < threads; ++t) {
    state.fibers[t].thread = order[t] = unsigned(t);
    state.fibers[t].stack.reset(new char[kStack]);
  }
  block = &state;
  for (state.block.x = 0; state.block.x < grid; ++state.block.x) run_block(order);
  block = nullptr;
}
