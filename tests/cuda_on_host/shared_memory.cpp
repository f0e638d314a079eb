// shared_memory.cpp: the __shared__ variables. They are compiled as thread_local, so the linker places those of all
// kernels, templates included, in one region. This file is compiled twice and linked before and after the kernels: its
// two variables mark the ends of the region.
#include "layer.h"

#if defined(PPO_SHARED_BEGIN)
__thread char shared_begin[16] __attribute__((aligned(16)));
#else
extern __thread char shared_begin[16];
__thread char shared_end[16] __attribute__((aligned(16)));

namespace cuda_on_host {
namespace {

uint32_t poison;
uint32_t *first, *last;  // the ends, in the CPU thread that runs the grid

}  // namespace

// The garbage at the start of a block: NaN as any floating-point type, large or negative as any integer type.
void poison_shared(bool negative) {
  first = reinterpret_cast<uint32_t*>(shared_begin);
  last = reinterpret_cast<uint32_t*>(shared_end);
  poison = negative ? 0xfff5fff5u : 0x7ff57ff5u;
  std::fill(first, last, poison);
}

size_t written_shared_bytes() {
  return 4 * size_t(std::count_if(first, last, [](uint32_t word) { return word != poison; }));
}

bool is_shared(uintptr_t address) {
  return address >= reinterpret_cast<uintptr_t>(first) && address < reinterpret_cast<uintptr_t>(last);
}

}  // namespace cuda_on_host
#endif
