// simd.h: vectors as wide as the instruction set that the including file is compiled for (levels.h).
//         Selecting by ?: is a blend; a comparison kept in a variable may be taken apart lane by lane (GCC 12, AVX-512).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "host_device.h"
#include "whiten.h"

#define PPO_INLINE inline __attribute__((always_inline))
#define PPO_INLINE_LAMBDA __attribute__((always_inline))

// Vectors are passed between inlined functions only, so no call depends on the ABI this warns about.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace ppo_ext {
namespace {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float f32v __attribute__((vector_size(kVectorBytes)));
typedef double f64v __attribute__((vector_size(kVectorBytes)));
typedef int32_t i32v __attribute__((vector_size(kVectorBytes)));
typedef int64_t i64v __attribute__((vector_size(kVectorBytes)));
typedef uint32_t u32v __attribute__((vector_size(kVectorBytes)));
typedef uint16_t u16v __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t u8v __attribute__((vector_size(kVectorBytes / 4)));
typedef uint8_t u8half __attribute__((vector_size(kVectorBytes / 8)));
typedef float f32half __attribute__((vector_size(kVectorBytes / 2)));

// The vector of elements of type A, how many it holds, and what ?: on it takes.
template <class A>
using vector_of = std::conditional_t<std::is_same<A, double>::value, f64v, f32v>;
template <class A>
using condition_of = std::conditional_t<std::is_same<A, double>::value, i64v, i32v>;
template <class A>
constexpr int kLanesOf = std::is_same<A, double>::value ? kVectorBytes / 8 : kVectorBytes / 4;
constexpr int kLanes = kLanesOf<float>;

#if defined(__AVX512F__)
constexpr __mmask16 kAllLanes = 0xffff;  // GCC 12 warns about the intrinsics without a mask
#endif

PPO_INLINE f32v splat(float x) { return f32v{} + x; }

}  // namespace

template <>
struct Number<f32v> {
  static PPO_INLINE f32v of(double x) { return splat(float(x)); }
};

template <>
struct Number<f64v> {
  static PPO_INLINE f64v of(double x) { return f64v{} + x; }
};

namespace {

// ---- memory ----

template <class V>
PPO_INLINE V load_bytes(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

PPO_INLINE f32v load(const float* p) { return load_bytes<f32v>(p); }
PPO_INLINE f64v load(const double* p) { return load_bytes<f64v>(p); }
PPO_INLINE f32v load(const BFloat16* p) { return (f32v)(__builtin_convertvector(load_bytes<u16v>(p), u32v) << 16); }

PPO_INLINE f32v load(const Half* p) {
#if defined(__AVX512F__)
  return (f32v)_mm512_maskz_cvtph_ps(kAllLanes, load_bytes<__m256i>(p));
#elif defined(__F16C__)
  return (f32v)_mm256_cvtph_ps(load_bytes<__m128i>(p));
#else
  const u32v h = __builtin_convertvector(load_bytes<u16v>(p), u32v);
  // A half's exponent and mantissa, moved into a float's, are off by 2^112; the product also mends subnormals.
  const f32v magnitude = (f32v)((h & 0x7fffu) << 13) * 0x1p112f;
  const u32v exponent = h & 0x7c00u, infinite_or_nan = exponent == 0x7c00u ? u32v{} + 0x7f800000u : u32v{};
  return (f32v)((u32v)magnitude | infinite_or_nan | ((h & 0x8000u) << 16));
#endif
}

PPO_INLINE void store(float* p, f32v x) { std::memcpy(p, &x, sizeof(x)); }
PPO_INLINE void store(double* p, f64v x) { std::memcpy(p, &x, sizeof(x)); }

PPO_INLINE void store(BFloat16* p, f32v x) {
  const u32v bits = (u32v)x;
  const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u16v out = __builtin_convertvector(x != x ? u32v{} + 0x7fc0u : rounded, u16v);
  std::memcpy(p, &out, sizeof(out));
}

PPO_INLINE void store(Half* p, f32v x) {
#if defined(__AVX512F__)
  const __m256i out = _mm512_maskz_cvtps_ph(kAllLanes, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const __m128i out = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const u32v bits = (u32v)x;
  const u32v sign = (bits >> 16) & 0x8000u, a = bits & 0x7fffffffu;
  const u32v normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const u32v subnormal = (u32v)((f32v)a + 0.5f) - 0x3f000000u;  // adding 0.5 rounds to the half's smallest step
  u32v h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? u32v{} + 0x7c00u : h;
  h = a > 0x7f800000u ? u32v{} + 0x7e00u : h;
  const u16v out = __builtin_convertvector(h | sign, u16v);
#endif
  std::memcpy(p, &out, sizeof(out));
}

// The last n elements of a block, too few for a vector; the other lanes are 0.
template <class T>
PPO_INLINE auto load_tail(const T* p, int n) {
  char padded[sizeof(T) * (sizeof(load(p)) / sizeof(load(p)[0]))] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(reinterpret_cast<const T*>(padded));
}

template <class T, class V>
PPO_INLINE void store_tail(T* p, V x, int n) {
  char padded[sizeof(T) * (sizeof(V) / sizeof(x[0]))];
  store(reinterpret_cast<T*>(padded), x);
  std::memcpy(p, padded, n * sizeof(T));
}

// The same with the other lanes -inf, which has no probability.
template <class T>
PPO_INLINE f32v load_logits_tail(const T* p, int n) {
  float lanes[kLanes];
  store(lanes, load_tail(p, n));
  for (int i = n; i < kLanes; ++i) lanes[i] = -INFINITY;
  return load(lanes);
}

// A stretch of a row as contiguous elements: the row itself, or a copy of it where its elements lie apart.
template <class T>
PPO_INLINE const T* contiguous_block(const T* row, int64_t begin, int n, int64_t stride, T* buffer) {
  if (stride == 1) return row + begin;
  for (int i = 0; i < n; ++i) std::memcpy(buffer + i, row + (begin + i) * stride, sizeof(T));
  return buffer;
}

// All bits of the lanes whose flag is set.
template <class A>
PPO_INLINE condition_of<A> lanes_where(const bool* flags) {
  using bytes = std::conditional_t<std::is_same<A, double>::value, u8half, u8v>;
  return -__builtin_convertvector(load_bytes<bytes>(flags), condition_of<A>);
}

// ---- across lanes ----

// The larger (smaller) of two; the second if either is NaN. GCC 12 does not find the one instruction behind ?: by itself.
PPO_INLINE f32v max_or_second(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (f32v)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

PPO_INLINE f32v min_or_second(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_maskz_min_ps(kAllLanes, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (f32v)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// The elements of a vector of A in fp64.
template <class A>
struct Wide {
  static constexpr int kParts = std::is_same<A, double>::value ? 1 : 2;
  f64v part[kParts];
};

PPO_INLINE Wide<double> widen(f64v x) { return {{x}}; }
PPO_INLINE f64v narrow(const Wide<double>& x) { return x.part[0]; }

// GCC 12 converts half a vector in four steps where there is one instruction.
PPO_INLINE f64v in_fp64(f32half x) {
#if defined(__AVX512F__)
  return (f64v)_mm512_maskz_cvtps_pd(0xff, (__m256)x);
#elif defined(__AVX2__)
  return (f64v)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, f64v);
#endif
}

PPO_INLINE f32half in_fp32(f64v x) {
#if defined(__AVX512F__)
  return (f32half)_mm512_maskz_cvtpd_ps(0xff, (__m512d)x);
#elif defined(__AVX2__)
  return (f32half)_mm256_cvtpd_ps((__m256d)x);
#else
  return __builtin_convertvector(x, f32half);
#endif
}

PPO_INLINE Wide<float> widen(f32v x) {
  f32half half[2];
  std::memcpy(half, &x, sizeof(x));
  return {{in_fp64(half[0]), in_fp64(half[1])}};
}

PPO_INLINE f32v narrow(const Wide<float>& x) {
  const f32half half[2] = {in_fp32(x.part[0]), in_fp32(x.part[1])};
  f32v result;
  std::memcpy(&result, half, sizeof(result));
  return result;
}

// A sum of vectors, lane by lane in fp64.
struct LaneSum {
  f64v lanes{};

  template <class V>
  PPO_INLINE LaneSum& add(V x) {
    for (const f64v part : widen(x).part) lanes += part;
    return *this;
  }

  PPO_INLINE double total() const {
    constexpr int kCount = kLanesOf<double>;
    double sums[kCount];
    std::memcpy(sums, &lanes, sizeof(lanes));
    for (int width = kCount / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    return sums[0];
  }
};

// The sum of several vectors in fp32, in pairs.
template <int kCount>
PPO_INLINE f32v sum_in_pairs(f32v (&x)[kCount]) {
  for (int half = kCount / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) x[k] += x[k + half];
  return x[0];
}

// Weight, mean and variance from distances to one of the numbers, so that no two large sums are subtracted.
template <class A>
struct LaneMoments {
  A origin;
  f64v weight, sum, squares;

  // Entries of weight 0 must hold something finite.
  PPO_INLINE void add(vector_of<A> x, vector_of<A> weights) {
    const Wide<A> wide = widen(x), w = widen(weights);
    for (int k = 0; k < Wide<A>::kParts; ++k) {
      const f64v gap = wide.part[k] - double(origin), weighted = w.part[k] * gap;
      weight += w.part[k];
      sum += weighted;
      squares += weighted * gap;
    }
  }

  PPO_INLINE Moments<double> moments() const {
    const double total = LaneSum{weight}.total(), gap = LaneSum{sum}.total() / total;
    const double m2 = LaneSum{squares}.total() - LaneSum{sum}.total() * gap;
    return total == 0 ? Moments<double>{} : Moments<double>{total, origin + gap, m2 < 0 ? 0 : m2};
  }
};

// The first finite one of entries [begin, end) that count, 0 if there is none.
template <class A, class Counts>
PPO_INLINE A first_finite(const A* x, int64_t begin, int64_t end, const Counts& counts) {
  for (int64_t i = begin; i < end; ++i)
    if (counts(i) && x[i] - x[i] == A(0)) return x[i];
  return A(0);
}

PPO_INLINE float max_lanes(f32v x) {
  float parts[kLanes];
  store(parts, x);
  float result = parts[0];
  for (int i = 1; i < kLanes; ++i) result = parts[i] > result ? parts[i] : result;
  return result;
}

// The largest of n elements; NaN does not count (it shows in the sums that follow).
template <class T>
PPO_INLINE float block_max(const T* x, int n) {
  f32v a = splat(-INFINITY), b = a;
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    a = max_or_second(load(x + i), a);
    b = max_or_second(load(x + i + kLanes), b);
  }
  for (; i + kLanes <= n; i += kLanes) a = max_or_second(load(x + i), a);
  if (i < n) a = max_or_second(load_logits_tail(x + i, n - i), a);
  return max_lanes(max_or_second(a, b));
}

// ---- powers ----

#if defined(__AVX512DQ__)

// 2^f for 0 <= f < 1, exact at 0; relative error 8e-8.
PPO_INLINE f32v exp2_fraction(f32v f) {
  f32v p = splat(1.960706722e-4f);
  p = p * f + 1.298304764e-3f;
  p = p * f + 9.62853990e-3f;
  p = p * f + 5.550338328e-2f;
  p = p * f + 0.2402265221f;
  p = p * f + 0.6931471825f;
  return p * f + 1.0f;
}

// The integer n that leaves x - n to exp2_fraction, and p times 2^n, of which the integer part counts.
PPO_INLINE f32v whole_part(f32v x) { return (f32v)_mm512_maskz_roundscale_ps(kAllLanes, (__m512)x, _MM_FROUND_TO_NEG_INF); }
PPO_INLINE f32v times_power(f32v p, f32v n) { return (f32v)_mm512_maskz_scalef_ps(kAllLanes, (__m512)p, (__m512)n); }

// 2^x to about one unit in the last place. 2^-inf is 0, and NaN stays.
PPO_INLINE f32v exp2_of(f32v x) {
  return times_power(exp2_fraction((f32v)_mm512_maskz_reduce_ps(kAllLanes, (__m512)x, _MM_FROUND_TO_NEG_INF)), x);
}

#else

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits

// 2^f for |f| <= 1/2, exact at 0; relative error 7e-8.
PPO_INLINE f32v exp2_fraction(f32v f) {
  f32v p = splat(1.527230488e-4f);
  p = p * f + 1.341047930e-3f;
  p = p * f + 9.618774988e-3f;
  p = p * f + 5.550293624e-2f;
  p = p * f + 0.2402264476f;
  p = p * f + 0.6931472421f;
  return p * f + 1.0f;
}

// 2^x to about one unit in the last place from -126 on, 0 further down, inf from 127.5 on. NaN stays.
PPO_INLINE f32v exp2_of(f32v x) {
  const f32v low = splat(-127.0f), high = splat(128.0f);  // whose biased exponents are those of 0 and inf
  const f32v bounded = min_or_second(high, max_or_second(low, x));
  const f32v shifted = bounded + (kRound + 127.0f);
  return exp2_fraction(bounded - (shifted - (kRound + 127.0f))) * (f32v)((i32v)shifted << 23);
}

// The integer n that leaves x - n to exp2_fraction, and p times 2^n for n <= 128, in two steps, as 2^128 is no float.
PPO_INLINE f32v whole_part(f32v x) { return (x + kRound) - kRound; }
PPO_INLINE f32v times_power(f32v p, f32v n) { return p * (f32v)((i32v)(n + (kRound + 126.0f)) << 23) * 2.0f; }

#endif

// exp(x) to about one unit in the last place: 0 below -87, inf above 88.7, NaN for NaN.
PPO_INLINE f32v exp_of(f32v x) {
  const f32v low = splat(-87.33654f), high = splat(88.72284f);
  const f32v bounded = min_or_second(high, max_or_second(low, x));
  const f32v n = whole_part(bounded * float(kLog2E));
  const f32v rest = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  const f32v inside = times_power(exp2_fraction(rest * float(kLog2E)), n);
  return x > high ? splat(INFINITY) : (x < low ? splat(0.0f) : inside);
}

}  // namespace
}  // namespace ppo_ext
