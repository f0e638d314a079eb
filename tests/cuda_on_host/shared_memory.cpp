// shared_memory.cpp: __shared__ variables. All kernels' are thread_local, so that the linker gathers them, those of
// templates as well; compiled twice and linked before and after the kernels, this file gives the two ends.
#include "layer.h"

#if defined(PPO_SHARED_BEGIN)
__thread char shared_begin[16] __attribute__((aligned(16)));
#else
extern __thread char shared_begin[16];
__thread char shared_end[16] __attribute__((aligned(16)));

namespace cuda_on_host {
namespace {

uint32_t poison;
uint32_t *first, *last;  // those of the CPU thread that runs the grid

}  // namespace

// A NaN in every floating-point type, and a large or a negative number in every integer type.
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
