// simd.h: vectors as wide as the instruction set that the including file is compiled for (levels.h).
//         On vectors `a < b ? x : y` is one blend. A comparison that is kept in a variable may cost more: for AVX-512,
//         GCC 12 may take it apart lane by lane.
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
#include "moments.h"

#define PPO_INLINE inline __attribute__((always_inline))
#define PPO_INLINE_LAMBDA __attribute__((always_inline))

// The warning is that vectors are passed in other ways at other levels. Only inlined functions take them here.
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

// For elements of type A: the vector, the condition that ?: on it takes (all bits of a lane are set where it holds),
// and the number of lanes.
template <class A>
using vector_of = std::conditional_t<std::is_same<A, double>::value, f64v, f32v>;
template <class A>
using condition_of = std::conditional_t<std::is_same<A, double>::value, i64v, i32v>;
template <class A>
constexpr int kLanesOf = std::is_same<A, double>::value ? kVectorBytes / 8 : kVectorBytes / 4;
constexpr int kLanes = kLanesOf<float>;

#if defined(__AVX512F__)
constexpr __mmask16 kAllLanes = 0xffff;  // for intrinsics with a mask; GCC 12 warns about those without one
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
  // The exponent and mantissa of a half, moved to their places in a float, give its value times 2^-112, also if it is
  // subnormal. The product undoes that.
  const f32v magnitude = (f32v)((h & 0x7fffu) << 13) * 0x1p112f;
  const u32v exponent = h & 0x7c00u, infinite_or_nan = exponent == 0x7c00u ? u32v{} + 0x7f800000u : u32v{};
  return (f32v)((u32v)magnitude | infinite_or_nan | ((h & 0x8000u) << 16));
#endif
}

// The elements of two vectors. load_pair may mix up their order; store_pair restores it.
struct Pair {
  f32v x[2];
};

template <class T>
PPO_INLINE Pair load_pair(const T* p) {
  return {{load(p), load(p + kLanes)}};
}

PPO_INLINE Pair load_pair(const BFloat16* p) {
  const u32v both = load_bytes<u32v>(p);
  return {{(f32v)(both << 16), (f32v)(both & 0xffff0000u)}};
}

PPO_INLINE void store(float* p, f32v x) { std::memcpy(p, &x, sizeof(x)); }
PPO_INLINE void store(double* p, f64v x) { std::memcpy(p, &x, sizeof(x)); }

// Rounds to bfloat16, which is the upper half of each lane; the lower half of the result means nothing. The lower half
// of a NaN must be 0, or the addition might turn it into a number. That holds for results of bfloat16s and of `clean`
// numbers.
PPO_INLINE u32v rounded_to_bfloat16(f32v x) {
  const u32v bits = (u32v)x;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// x, or if that is a NaN the one called NAN, whose lower half is 0.
PPO_INLINE float clean(float x) { return x == x ? x : NAN; }

PPO_INLINE void store(BFloat16* p, f32v x) {
  const u16v out = __builtin_convertvector(rounded_to_bfloat16(x) >> 16, u16v);
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

template <class T>
PPO_INLINE void store_pair(T* p, const Pair& pair) {
  store(p, pair.x[0]);
  store(p + kLanes, pair.x[1]);
}

PPO_INLINE void store_pair(BFloat16* p, const Pair& pair) {
  const u32v both = (rounded_to_bfloat16(pair.x[0]) >> 16) | (rounded_to_bfloat16(pair.x[1]) & 0xffff0000u);
  std::memcpy(p, &both, sizeof(both));
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

// n elements of a row from column `begin` on, contiguous: in their place if the stride is 1, else copied to the buffer.
template <class T>
PPO_INLINE const T* contiguous_block(const T* row, int64_t begin, int n, int64_t stride, T* buffer) {
  if (stride == 1) return row + begin;
  for (int i = 0; i < n; ++i) std::memcpy(buffer + i, row + (begin + i) * stride, sizeof(T));
  return buffer;
}

// Bytes as the lanes of a vector of integers: one instruction, where GCC 12 makes many of __builtin_convertvector.
PPO_INLINE i32v in_lanes(u8v bytes) {
#if defined(__AVX512F__)
  return (i32v)_mm512_maskz_cvtepu8_epi32(kAllLanes, (__m128i)bytes);
#elif defined(__AVX2__)
  return (i32v)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
#else
  return __builtin_convertvector(bytes, i32v);
#endif
}

PPO_INLINE i64v in_lanes(u8half bytes) {
#if defined(__AVX512F__)
  return (i64v)_mm512_maskz_cvtepu8_epi64(0xff, _mm_cvtsi64_si128((int64_t)bytes));
#elif defined(__AVX2__)
  return (i64v)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128((int32_t)bytes));
#else
  return __builtin_convertvector(bytes, i64v);
#endif
}

// The condition that holds in the lanes whose flag is set.
template <class A>
PPO_INLINE condition_of<A> lanes_where(const bool* flags) {
  using bytes = std::conditional_t<std::is_same<A, double>::value, u8half, u8v>;
  return -in_lanes(load_bytes<bytes>(flags));
}

// The same for n flags, too few for a vector; it does not hold in the other lanes.
template <class A>
PPO_INLINE condition_of<A> lanes_where_tail(const bool* flags, int n) {
  bool padded[kLanesOf<A>] = {};
  std::memcpy(padded, flags, n);
  return lanes_where<A>(padded);
}

// ---- across lanes ----

// The lanes of a and b in the order of `lanes`, where those of b have the numbers from their count on.
template <class V, class I>
PPO_INLINE V shuffled(V a, V b, I lanes) {
#if defined(__clang__)
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  V result{};
  for (int l = 0; l < kCount; ++l) result[l] = lanes[l] < kCount ? a[lanes[l]] : b[lanes[l] - kCount];
  return result;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// The larger (smaller) of two; the second if either is NaN. One instruction, which GCC 12 does not make of a ?: by
// itself.
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

}  // namespace

// As in host_device.h with fewer instructions: a maximum gives its second operand if either is NaN.
template <>
PPO_INLINE f32v max_or_nan(f32v a, f32v b) {
  return a != a ? a : max_or_second(a, b);
}

template <>
PPO_INLINE f32v min_or_nan(f32v a, f32v b) {
  return a != a ? a : min_or_second(a, b);
}

namespace {

// The elements of a vector of A, converted to fp64: two vectors for fp32.
template <class A>
struct Wide {
  static constexpr int kParts = std::is_same<A, double>::value ? 1 : 2;
  f64v part[kParts];
};

PPO_INLINE Wide<double> widen(f64v x) { return {{x}}; }
PPO_INLINE f64v narrow(const Wide<double>& x) { return x.part[0]; }

// One instruction each, where GCC 12 makes four of __builtin_convertvector.
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

// A sum of vectors of zeros and ones, in fewer instructions.
template <class A>
struct LaneCount {
  using V = std::conditional_t<std::is_same<A, double>::value, f64v, i32v>;
  V lanes{};

  PPO_INLINE LaneCount& add(vector_of<A> x) {
    lanes += __builtin_convertvector(x, V);
    return *this;
  }

  PPO_INLINE double total() const {
    double sum = 0;
    for (int k = 0; k < kLanesOf<A>; ++k) sum += double(lanes[k]);
    return sum;
  }
};

// Weight, mean and variance of numbers, from their distances to one of them, the origin. Without that the variance
// would be the difference of two large sums.
template <class A>
struct LaneMoments {
  A origin;
  f64v weight, sum, squares;

  // x must be finite where its weight is 0, as it is multiplied by it.
  PPO_INLINE void add(vector_of<A> x, vector_of<A> weights) {
    const Wide<A> wide = widen(x), w = widen(weights);
    for (int k = 0; k < Wide<A>::kParts; ++k) {
      const f64v gap = wide.part[k] - double(origin), weighted = w.part[k] * gap;
      weight += w.part[k];
      sum += weighted;
      squares += weighted * gap;
    }
  }

  PPO_INLINE Moments moments() const {
    const double total = LaneSum{weight}.total(), gap = LaneSum{sum}.total() / total;
    const double m2 = LaneSum{squares}.total() - LaneSum{sum}.total() * gap;
    return total == 0 ? Moments{} : Moments{total, origin + gap, m2 < 0 ? 0 : m2};
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

// The largest of n elements. A NaN is ignored; it shows in the sums that follow.
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

// Whether the condition holds in any lane.
PPO_INLINE bool any_lane(i32v condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)condition) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)condition) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= condition[i];
  return bits != 0;
#endif
}

// The first of n elements that equals `value`, which one of them does.
template <class T>
PPO_INLINE int first_equal(const T* x, int n, float value) {
  int i = 0;
  while (i + kLanes <= n && !any_lane(load(x + i) == value)) i += kLanes;
  while (float(x[i]) != value) ++i;
  return i;
}

// ---- powers ----

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

// 2^d as a product of two factors. `plus` adds it to a sum with one rounding, by an intrinsic: left to itself, the
// compiler would fuse multiplication and addition or not, depending on what else the product is used for, and the bits
// would change.
struct Power {
  f32v whole, fraction;

  PPO_INLINE f32v value() const { return whole * fraction; }

  PPO_INLINE f32v plus(f32v sum) const {
#if defined(__AVX512F__)
    return (f32v)_mm512_maskz_fmadd_ps(kAllLanes, (__m512)whole, (__m512)fraction, (__m512)sum);
#elif defined(__AVX2__)
    return (f32v)_mm256_fmadd_ps((__m256)whole, (__m256)fraction, (__m256)sum);
#else
    return sum + whole * fraction;
#endif
  }
};

// 2^d = 2^s 2^r, where s is d rounded to a multiple of 1 / kSteps, a step, and r is the rest. 2^s is an entry of a
// table times a power of 2 with a whole exponent. 2^r is exp2_rest(r + kRestOffset), a polynomial.
#if defined(__AVX512F__)
constexpr int kSteps = 32;
// 2^r = c ((r + h)^2 + g) with a relative error of 2e-7, which is one multiplication less than a polynomial of degree 2
// takes. The linear term of 2^r asks for h near 1 / ln 2 = 1.4427. h = 46/32 is a whole number of steps, so that it is
// added to r without another instruction: s - h is subtracted from d in place of s. c is part of the table, which is
// scaled so that 2^0 is exactly 1. The whole exponent is floor(s - h), so that the entry for s = k/32 is
// 2^(k/32 - floor((k - 46) / 32)) c.
constexpr float kRestOffset = 46.0f / kSteps;
constexpr f32v kStepPowers[] = {
    {0x1.edc582p-1f, 0x1.f8956ap-1f, 0x1.01d0fap+0f, 0x1.077634p+0f, 0x1.0d3b16p+0f, 0x1.13204ep+0f, 0x1.192692p+0f,
     0x1.1f4e9cp+0f, 0x1.259928p+0f, 0x1.2c06fap+0f, 0x1.3298d4p+0f, 0x1.394f82p+0f, 0x1.402bd2p+0f, 0x1.472e9ap+0f,
     0x1.4e58acp-1f, 0x1.55aae8p-1f},
    {0x1.5d2630p-1f, 0x1.64cb66p-1f, 0x1.6c9b78p-1f, 0x1.749756p-1f, 0x1.7cbff6p-1f, 0x1.851652p-1f, 0x1.8d9b6ap-1f,
     0x1.965044p-1f, 0x1.9f35eep-1f, 0x1.a84d76p-1f, 0x1.b197f6p-1f, 0x1.bb168cp-1f, 0x1.c4ca5ap-1f, 0x1.ceb48cp-1f,
     0x1.d8d652p-1f, 0x1.e330e4p-1f}};
PPO_INLINE f32v exp2_rest(f32v q) { return q * q + 2.08126116f; }
#elif defined(__AVX2__)
constexpr int kSteps = 8;
constexpr float kRestOffset = 0;
constexpr f32v kStepPowers = {0x1.000000p+0f, 0x1.172b84p+0f, 0x1.306fe0p+0f, 0x1.4bfdaep+0f,
                              0x1.6a09e6p+0f, 0x1.8ace54p+0f, 0x1.ae89fap+0f, 0x1.d5818ep+0f};
PPO_INLINE f32v exp2_rest(f32v r) {  // relative error 3e-8
  return ((splat(5.549622327e-2f) * r + 0.2402576357f) * r + 0.6931472421f) * r + 1.0f;
}
#else
constexpr int kSteps = 1;
constexpr float kRestOffset = 0;
PPO_INLINE f32v exp2_rest(f32v r) { return exp2_fraction(r); }
#endif

// 2^(d scale) to about one unit in the last place: 0 below 2^-127, inf from 2^128 on, NaN for NaN.
class Powers {
 public:
  PPO_INLINE explicit Powers(float scale) : scale_(scale), lowest_(kLowest / scale), highest_(kHighest / scale) {}

  // A number of the same power as d for which of_bounded is right. Without kBounds it is d itself if
  // kBoundsAreOptional: this is faster, and right for all d but -inf.
  template <bool kBounds = true>
  PPO_INLINE f32v bounded(f32v d) const {
    return kBounds || !kBoundsAreOptional ? within_exponents(max_or_second(splat(lowest_), d)) : d;
  }

  // The power of a d that comes from `bounded`. If kBoundsAreOptional any d but -inf is right, and -inf gives NaN.
  PPO_INLINE Power of_bounded(f32v d) const {
    const f32v shifted = d * scale_ + kRound / kSteps, steps = shifted - (kRound / kSteps + kRestOffset);
    return {whole(shifted, steps), exp2_rest(d * scale_ - steps)};
  }

  PPO_INLINE Power of(f32v d) const { return of_bounded(bounded(d)); }

#if defined(__AVX512F__)
  static constexpr bool kBoundsAreOptional = true;

 private:
  static constexpr float kLowest = -1e4f, kHighest = INFINITY;

  PPO_INLINE f32v within_exponents(f32v d) const { return d; }

  static PPO_INLINE f32v whole(f32v shifted, f32v steps) {
    const __m512 power =
        _mm512_maskz_permutex2var_ps(kAllLanes, (__m512)kStepPowers[0], (__m512i)shifted, (__m512)kStepPowers[1]);
    return (f32v)_mm512_maskz_scalef_ps(kAllLanes, power, (__m512)steps);  // by 2^floor(steps)
  }
#else
  static constexpr bool kBoundsAreOptional = false;

 private:
  // Numbers that get the exponents of 0 and of inf.
  static constexpr float kLowest = -127.0f, kHighest = 128.0f;

  PPO_INLINE f32v within_exponents(f32v d) const { return min_or_second(splat(highest_), d); }

  static PPO_INLINE f32v whole(f32v shifted, f32v) {
#if defined(__AVX2__)
    constexpr i32v kStep = {0, 1, 2, 3, 4, 5, 6, 7};
    const i32v table = (i32v)kStepPowers - (kStep << 20);  // `shifted` << 20 adds k << 20 again
    return (f32v)((i32v)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)shifted) + ((i32v)shifted << 20));
#else
    return (f32v)(((i32v)shifted << 23) + 0x3f800000);
#endif
  }
#endif

  float scale_, lowest_;
  [[maybe_unused]] float highest_;  // in AVX-512
};

// x rounded to an integer n, which leaves x - n to exp2_fraction; and p * 2^n for n <= 128, by two factors, as 2^128 is
// no float.
PPO_INLINE f32v whole_part(f32v x) { return (x + kRound) - kRound; }
PPO_INLINE f32v times_power(f32v p, f32v n) { return p * (f32v)((i32v)(n + (kRound + 126.0f)) << 23) * 2.0f; }

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
