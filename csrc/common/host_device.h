// host_device.h: marks the scalar formulas that both the CPU and the CUDA files compile.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PPO_HD __host__ __device__ __forceinline__
#else
#define PPO_HD inline __attribute__((always_inline))
#endif

namespace ppo_ext {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// A constant as an A: a float, a double, or on the CPU a vector of them (simd.h).
template <class A>
struct Number {
  static PPO_HD constexpr A of(double x) { return A(x); }
};

// The formulas below and in <op>.h choose by ?: alone where the CPU runs them on vectors.

// The larger of two numbers; NaN if either is, which fmax would drop.
template <class A>
PPO_HD A max_or_nan(A a, A b) {
  return a != a ? a : (b != b ? b : (a > b ? a : b));
}

template <class A>
PPO_HD A min_or_nan(A a, A b) {
  return a != a ? a : (b != b ? b : (a < b ? a : b));
}

// How much of the gradient of max(a, b) goes to a: half at a tie, as in torch.
template <class A>
PPO_HD A share_of_max(A a, A b) {
  return a > b ? Number<A>::of(1) : (a == b ? Number<A>::of(0.5) : Number<A>::of(0));
}

}  // namespace ppo_ext
