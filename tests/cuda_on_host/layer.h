// layer.h: what the parts of the host layer share.
//   fibers.h           stacks and the switch between them
//   grids.cpp          threads as fibers, the order in which they advance, grids, block barriers, errors
//   warps.cpp          shuffles, votes and warp barriers with their masks
//   memory.cpp         every load and store of a kernel: allocated? aligned? ordered?
//   races.cpp          who touched which byte since the last barrier
//   shared_memory.cpp  __shared__ variables: their garbage at the start of a block, their size
//   undefined.cpp      undefined behaviour that g++ instruments
//   binding.cpp        the Python module `layer`, by which tests set and read all this
// One grid runs at a time, one thread of it at a time.
#pragma once

#include <cstdint>
#include <map>
#include <random>
#include <stdexcept>
#include <string>

#include "cuda_on_host.h"

namespace cuda_on_host {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxSharedBytes = 48 * 1024;

struct Settings {
  unsigned seed = 0;
  int64_t max_blocks = 2147483647;
  bool races = true;  // whether accesses that no barrier orders are errors
};

struct Counters {
  uint64_t grids, blocks, switches, loads, stores, vector_accesses;
  size_t shared_bytes;  // the most that a grid's blocks wrote
};

extern Settings settings;
extern Counters counters;

class KernelError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- grids.cpp ----

// The thread that runs now. `interval` counts block barriers and blocks over all grids, so that it is never the same in
// two blocks; `grid_began` and `block_began` are the first ones of the running grid and block.
struct Running {
  bool in_kernel;
  unsigned thread, block, blocks, threads;
  uintptr_t stack;
  uint32_t interval, grid_began, block_began;
};
extern Running running;

// Lets others run until `wake` has been called for the running thread.
void wait_at(const char* what, Place place);
void wake(unsigned thread);

// Ends the running kernel: run_on_host throws a KernelError that names operator, block, thread and the lines at `pc`,
// or `line` where they cannot be found.
[[noreturn]] void fail(const std::string& sentence, void* pc = nullptr, const std::string& line = "");

std::string text_of(Place place);

// ---- warps.cpp ----

void reset_warps();
uint16_t warp_interval(unsigned warp);  // counts the warp's own barriers

// Why lanes wait in vain for others; empty if none does.
std::string describe_stuck_warps();

// ---- shared_memory.cpp ----

void poison_shared(bool negative);
size_t written_shared_bytes();  // since it was poisoned
bool is_shared(uintptr_t address);

// ---- races.cpp ----

enum class Access { load, store, atomic };

void check_order(uintptr_t address, size_t size, Access access, void* pc);
void forget_accesses();  // of earlier grids, if they take up too much memory

// ---- memory.cpp ----

bool address_sanitizer_is_active();

// ---- kernels that only tests of this layer run ----

using TestKernel = void (*)(int* data, int n);

// By name.
std::map<std::string, TestKernel>& test_kernels();

bool add_test_kernels(const std::map<std::string, TestKernel>& kernels);

}  // namespace cuda_on_host
