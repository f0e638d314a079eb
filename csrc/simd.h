// simd.h: 16 floats at a time on the CPU, for whatever instruction set the caller is compiled for.
#pragma once

#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "host_device.h"

// One copy of the function for each level, chosen when the library loads; everything it calls must inline into it.
#if defined(__x86_64__) && !defined(PPO_EXT_NO_CLONES)
#define PPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PPO_CLONES
#endif
#define PPO_INLINE inline __attribute__((always_inline))
#define PPO_INLINE_LAMBDA __attribute__((always_inline))

// Vectors are passed between inlined functions only, so no call depends on the ABI this warns about.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace ppo_ext {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

constexpr int kLanes = 16;
typedef float f32v __attribute__((vector_size(64)));
typedef int32_t i32v __attribute__((vector_size(64)));
typedef uint32_t u32v __attribute__((vector_size(64)));
typedef uint16_t u16v __attribute__((vector_size(32)));

PPO_INLINE f32v splat(float x) { return f32v{} + x; }

PPO_INLINE f32v load(const float* p) {
  f32v x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

PPO_INLINE f32v load(const BFloat16* p) {
  u16v x;
  std::memcpy(&x, p, sizeof(x));
  return (f32v)(__builtin_convertvector(x, u32v) << 16);
}

PPO_INLINE f32v load(const Half* p) {
  u16v x;
  std::memcpy(&x, p, sizeof(x));
  const u32v h = __builtin_convertvector(x, u32v);
  // A half's exponent and mantissa, moved into a float's, are off by 2^112; the product also mends subnormals.
  const f32v magnitude = (f32v)((h & 0x7fffu) << 13) * 0x1p112f;
  const u32v infinite_or_nan = (u32v)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (f32v)((u32v)magnitude | infinite_or_nan | ((h & 0x8000u) << 16));
}

PPO_INLINE void store(float* p, f32v x) { std::memcpy(p, &x, sizeof(x)); }

PPO_INLINE void store(BFloat16* p, f32v x) {
  const u32v bits = (u32v)x;
  const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32v nan = (u32v)(x != x);
  const u16v out = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), u16v);
  std::memcpy(p, &out, sizeof(out));
}

PPO_INLINE void store(Half* p, f32v x) {
  const u32v bits = (u32v)x;
  const u32v sign = (bits >> 16) & 0x8000u, a = bits & 0x7fffffffu;
  const u32v normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const u32v subnormal = (u32v)((f32v)a + 0.5f) - 0x3f000000u;  // adding 0.5 rounds to the half's smallest step
  const u32v is_subnormal = (u32v)(a < 0x38800000u), overflows = (u32v)(a >= 0x477ff000u), nan = (u32v)(a > 0x7f800000u);
  u32v h = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  h = (h & ~overflows) | (0x7c00u & overflows);
  h = (h & ~nan) | (0x7e00u & nan);
  const u16v out = __builtin_convertvector(h | sign, u16v);
  std::memcpy(p, &out, sizeof(out));
}

PPO_INLINE f32v max_ignoring_nan(f32v a, f32v x) { return x > a ? x : a; }

constexpr float kLog2e = 1.44269504f;
constexpr double kLn2 = 0.69314718055994531;
constexpr float kExp2Low = -126.0f;  // the smallest exponent of a normal float

// 2^f for |f| <= 1/2: minimax, relative error 2e-8.
PPO_INLINE f32v exp2_polynomial(f32v f) {
  f32v p = splat(1.5353362e-4f);
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.618437e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 0.24022648f;
  p = p * f + 0.6931472f;
  return p * f + 1.0f;
}

// 2^x for x <= 127 to about one unit in the last place. NaN stays; below -126 the result is 2^-126, which a sum of terms
// next to 1 cannot see.
PPO_INLINE f32v exp2_clamped(f32v x) {
  const f32v low = splat(kExp2Low);
  const f32v bounded = low > x ? low : x;
  const f32v round = splat(12582912.0f + 127.0f);  // 1.5 * 2^23 rounds to an integer, kept in the low bits with the bias
  const f32v shifted = bounded + round;
  return exp2_polynomial(bounded - (shifted - round)) * (f32v)((i32v)shifted << 23);
}

// exp(x) over the whole range to about one unit in the last place: 0 below -87, inf above 88.7, NaN for NaN.
PPO_INLINE f32v exp_vector(f32v x) {
  const f32v low = splat(-87.33654f), high = splat(88.72284f);
  const f32v bounded = x < low ? low : (x > high ? high : x);
  const f32v round = splat(12582912.0f + 126.0f);  // half the power of 2, as the whole one may be 2^128
  const f32v shifted = bounded * kLog2e + round;
  const f32v n = shifted - round;
  const f32v rest = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  const f32v result = exp2_polynomial(rest * kLog2e) * (f32v)((i32v)shifted << 23) * 2.0f;
  return x > high ? splat(INFINITY) : result;
}

// 2^x for x <= 127 with an exact 0 below -126, where a probability's gradient has to vanish.
PPO_INLINE f32v exp2_or_zero(f32v x) { return x < kExp2Low ? splat(0.0f) : exp2_clamped(x); }

// The lanes of x, added in pairs in fp64.
PPO_INLINE double sum_lanes(f32v x) {
  float parts[kLanes];
  store(parts, x);
  double sums[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) sums[i] = double(parts[i]) + parts[i + kLanes / 2];
  for (int width = kLanes / 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

PPO_INLINE float max_lanes(f32v x) {
  float parts[kLanes];
  store(parts, x);
  float result = parts[0];
  for (int i = 1; i < kLanes; ++i) result = parts[i] > result ? parts[i] : result;
  return result;
}

// A stretch of a row as contiguous elements: the row itself, or a copy of it where its elements lie apart.
template <class T>
PPO_INLINE const T* contiguous_block(const T* row, int64_t begin, int n, int64_t stride, T* buffer) {
  if (stride == 1) return row + begin;
  for (int i = 0; i < n; ++i) buffer[i] = row[(begin + i) * stride];
  return buffer;
}

// The last n < 16 elements of a block as a whole vector, filled up with `fill`.
template <class T>
PPO_INLINE f32v load_tail(const T* x, int n, float fill) {
  T padded[kLanes];
  for (int i = 0; i < kLanes; ++i) padded[i] = i < n ? x[i] : T(fill);
  return load(padded);
}

template <class T>
PPO_INLINE void store_tail(T* out, f32v x, int n) {
  T padded[kLanes];
  store(padded, x);
  for (int i = 0; i < n; ++i) out[i] = padded[i];
}

// The largest of n elements; NaN does not count (it shows in the sums that follow).
template <class T>
PPO_INLINE float block_max(const T* x, int n) {
  f32v a = splat(-INFINITY), b = a;
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    a = max_ignoring_nan(a, load(x + i));
    b = max_ignoring_nan(b, load(x + i + kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) a = max_ignoring_nan(a, load(x + i));
  if (i < n) a = max_ignoring_nan(a, load_tail(x + i, n - i, -INFINITY));
  return max_lanes(max_ignoring_nan(a, b));
}

}  // namespace ppo_ext
