// cuda_on_host.h: declares CUDA's keywords, built-in variables and primitives, so that g++ compiles the kernels for the
// host. The files named in layer.h implement them. A kernel that uses anything else of CUDA does not compile here.
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
#define __shared__ static thread_local  // one region for all of them: see shared_memory.cpp
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

typedef void* cudaStream_t;
inline int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }

namespace cuda_on_host {

struct Index {
  unsigned x;
};

// Declared const, as they do not change within one thread; it lets g++ reuse the result.
__attribute__((const)) unsigned thread_index();
__attribute__((const)) unsigned block_index();
__attribute__((const)) unsigned block_size();
__attribute__((const)) unsigned grid_size();

// A line of the source of a kernel.
struct Place {
  const char* file;
  int line;
};
inline bool operator==(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

enum class Intrinsic { shfl, shfl_down, shfl_up, shfl_xor, any, all, ballot, syncwarp };

void block_barrier(Place place);

// Waits until all lanes of the mask have called `intrinsic`; returns this lane's result.
uint64_t call_together(Intrinsic intrinsic, unsigned mask, uint64_t value, int lane, Place place);

// Reports an atomic access of *p by the running thread to the race check.
void touch_atomically(void* p, size_t size);

// The largest grid, for tests of kernels that loop over blocks; CUDA's own limit is 2147483647.
int64_t max_blocks();

// Runs a kernel: calls it once for every thread of every block. `op` names it in errors.
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

// Only one thread runs at a time, and switches happen only inside these primitives, so a plain update is atomic.
template <class T, class Update>
__attribute__((noinline, no_sanitize("thread"))) T update_atomically(T* p, const Update& update) {
  static_assert(is_atomic<T>, "as in CUDA");
  touch_atomically(p, sizeof(T));
  const T old = *p;
  *p = update(old);
  return old;
}

template <class T>
using same = typename std::common_type<T>::type;  // excludes this argument from the deduction of T

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::Index{cuda_on_host::thread_index()})
#define blockIdx (cuda_on_host::Index{cuda_on_host::block_index()})
#define blockDim (cuda_on_host::Index{cuda_on_host::block_size()})
#define gridDim (cuda_on_host::Index{cuda_on_host::grid_size()})

// The macros add the calling line as an argument, for error messages.
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
inline void __threadfence() {}  // one thread runs at a time, so memory is always up to date

#undef PPO_PLACE
