// host_device.h: what the scalar formulas need that both the CPU and the CUDA files compile.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define PPO_HD __host__ __device__ __forceinline__
#else
#define PPO_HD inline __attribute__((always_inline))
#endif

namespace ppo_ext {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// The type in which arithmetic on elements of type T runs.
template <class T>
using accumulate_t = std::conditional_t<std::is_same<T, double>::value, double, float>;

// Formulas are templates over their number type A: float, double, or on the CPU a vector of either (simd.h). A vector
// cannot be converted from a number or decide an `if`, so formulas that run on vectors take constants from Number and
// choose by ?:.
template <class A>
struct Number {
  static PPO_HD constexpr A of(double x) { return A(x); }
};

// The larger of two numbers; NaN if either is NaN (fmax would give the other one).
template <class A>
PPO_HD A max_or_nan(A a, A b) {
  return a != a ? a : (b != b ? b : (a > b ? a : b));
}

template <class A>
PPO_HD A min_or_nan(A a, A b) {
  return a != a ? a : (b != b ? b : (a < b ? a : b));
}

// The derivative of max(a, b) with respect to a: half at a tie, as in torch.
template <class A>
PPO_HD A share_of_max(A a, A b) {
  return a > b ? Number<A>::of(1) : (a == b ? Number<A>::of(0.5) : Number<A>::of(0));
}

}  // namespace ppo_ext
