// layer.h: the declarations that the files of the host layer share.
// Only one grid, and only one of its threads, runs at a time.
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
  bool races = true;  // whether a data race is an error
};

struct Counters {
  uint64_t grids, blocks, switches, loads, stores, vector_accesses;
  size_t shared_bytes;  // largest number of bytes that a block wrote
};

extern Settings settings;
extern Counters counters;

class KernelError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- grids.cpp ----

// The running thread. `interval` is increased at each block barrier and each new block and is never reset, so it
// differs between blocks; `grid_began` and `block_began` are its values at the start of the running grid and block.
struct Running {
  bool in_kernel;
  unsigned thread, block, blocks, threads;
  uintptr_t stack;
  uint32_t interval, grid_began, block_began;
};
extern Running running;

// Suspends the running thread until `wake` is called for it.
void wait_at(const char* what, Place place);
void wake(unsigned thread);

// Aborts the running kernel: run_on_host throws a KernelError with the operator, block, thread and the source lines at
// `pc`, or `line` if those are unknown.
[[noreturn]] void fail(const std::string& sentence, void* pc = nullptr, const std::string& line = "");

std::string text_of(Place place);

// ---- warps.cpp ----

void reset_warps();
uint16_t warp_interval(unsigned warp);  // the number of the warp's barriers so far

// The error text if lanes of a warp wait for lanes that have ended; otherwise empty.
std::string describe_stuck_warps();

// ---- shared_memory.cpp ----

void poison_shared(bool negative);
size_t written_shared_bytes();  // since the region was filled with garbage
bool is_shared(uintptr_t address);

// ---- races.cpp ----

enum class Access { load, store, atomic };

void check_order(uintptr_t address, size_t size, Access access, void* pc);
void forget_accesses();  // clears the table of earlier grids if it has become large

// ---- memory.cpp ----

bool address_sanitizer_is_active();

// ---- kernels that only tests of this layer run ----

using TestKernel = void (*)(int* data, int n);

// The kernels by name.
std::map<std::string, TestKernel>& test_kernels();

bool add_test_kernels(const std::map<std::string, TestKernel>& kernels);

}  // namespace cuda_on_host
