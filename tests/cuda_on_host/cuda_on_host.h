// cuda_on_host.h: CUDA's keywords, built-in variables and primitives for kernels that g++ compiles for the host. What
// they do is in layer.h and the files named there; what is not declared here, no kernel may use.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local  // so that the linker puts all of it in one place, shared_memory.cpp
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

typedef void* cudaStream_t;
inline int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }

namespace cuda_on_host {

struct Index {
  unsigned x;
};

// Constant for the code of one thread of one block, which is all that calls them.
__attribute__((const)) unsigned thread_index();
__attribute__((const)) unsigned block_index();
__attribute__((const)) unsigned block_size();
__attribute__((const)) unsigned grid_size();

// A line of the kernels' sources.
struct Place {
  const char* file;
  int line;
};
inline bool operator==(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

enum class Intrinsic { shfl, shfl_down, shfl_up, shfl_xor, any, all, ballot, syncwarp };

void block_barrier(Place place);

// What `intrinsic` gives this lane, once all lanes of the mask have called it.
uint64_t call_together(Intrinsic intrinsic, unsigned mask, uint64_t value, int lane, Place place);

// Says that the running thread is about to change *p atomically.
void touch_atomically(void* p, size_t size);

// How many blocks a grid may have, at most CUDA's own 2147483647.
int64_t max_blocks();

// Runs the kernel of operator `op` in every thread of every block.
void run_on_host(const char* op, int64_t blocks, int threads, const std::function<void()>& kernel);

template <class T>
T shuffle(Intrinsic intrinsic, unsigned mask, T value, int lane, Place place) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "as in CUDA");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = call_together(intrinsic, mask, bits, lane, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
constexpr bool is_atomic =
    std::is_same<T, int>::value || std::is_same<T, unsigned>::value || std::is_same<T, unsigned long long>::value ||
    std::is_same<T, float>::value || std::is_same<T, double>::value;

// One thread runs at a time and only these primitives pass the turn on, so that a plain update is atomic.
template <class T, class Update>
__attribute__((noinline, no_sanitize("thread"))) T update_atomically(T* p, const Update& update) {
  static_assert(is_atomic<T>, "as in CUDA");
  touch_atomically(p, sizeof(T));
  const T old = *p;
  *p = update(old);
  return old;
}

template <class T>
using same = typename std::common_type<T>::type;  // keeps an argument from taking part in finding T

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::Index{cuda_on_host::thread_index()})
#define blockIdx (cuda_on_host::Index{cuda_on_host::block_index()})
#define blockDim (cuda_on_host::Index{cuda_on_host::block_size()})
#define gridDim (cuda_on_host::Index{cuda_on_host::grid_size()})

// Each primitive knows the line that calls it, which CUDA's do not take.
#define PPO_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(PPO_PLACE) { cuda_on_host::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, PPO_PLACE) {
  cuda_on_host::call_together(cuda_on_host::Intrinsic::syncwarp, mask, 0, 0, {file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, PPO_PLACE) {
  return cuda_on_host::shuffle(cuda_on_host::Intrinsic::shfl, mask, value, lane, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, PPO_PLACE) {
  return cuda_on_host::shuffle(cuda_on_host::Intrinsic::shfl_down, mask, value, int(by), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, PPO_PLACE) {
  return cuda_on_host::shuffle(cuda_on_host::Intrinsic::shfl_up, mask, value, int(by), {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, PPO_PLACE) {
  return cuda_on_host::shuffle(cuda_on_host::Intrinsic::shfl_xor, mask, value, lanes, {file, line});
}

inline int __any_sync(unsigned mask, int predicate, PPO_PLACE) {
  return int(cuda_on_host::call_together(cuda_on_host::Intrinsic::any, mask, predicate != 0, 0, {file, line}));
}
inline int __all_sync(unsigned mask, int predicate, PPO_PLACE) {
  return int(cuda_on_host::call_together(cuda_on_host::Intrinsic::all, mask, predicate != 0, 0, {file, line}));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, PPO_PLACE) {
  return unsigned(cuda_on_host::call_together(cuda_on_host::Intrinsic::ballot, mask, predicate != 0, 0, {file, line}));
}

template <class T>
T atomicAdd(T* p, cuda_on_host::same<T> x) {
  return cuda_on_host::update_atomically(p, [x](T old) { return T(old + x); });
}
template <class T>
T atomicMax(T* p, cuda_on_host::same<T> x) {
  static_assert(std::is_integral<T>::value, "as in CUDA");
  return cuda_on_host::update_atomically(p, [x](T old) { return std::max(old, x); });
}
template <class T>
T atomicExch(T* p, cuda_on_host::same<T> x) {
  return cuda_on_host::update_atomically(p, [x](T) { return x; });
}
template <class T>
T atomicCAS(T* p, cuda_on_host::same<T> expected, cuda_on_host::same<T> x) {
  static_assert(std::is_integral<T>::value, "as in CUDA");
  return cuda_on_host::update_atomically(p, [=](T old) { return old == expected ? x : old; });
}
inline void __threadfence() {}  // memory is written in the order of the source here

#undef PPO_PLACE
