// logprobs_simd.cpp: the rows of logprobs_cpu.cpp, a vector of logits at a time, in blocks that stay in the first cache.
// Sums      lanes in fp32 within a block, in fp64 across blocks, in an order that depends on V only

#include "logprobs_simd.h"
#include "simd.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 2048;
constexpr int kGroup = 8;  // vectors whose terms are added in fp32, in pairs
// A block's sum of at most this shows that no logit exceeds the origin by more than 12 powers of 2.
constexpr double kLargestSum = 4096;

// As softmax_bounded: 2^y y must be 0 and not NaN where 2^y is 0.
PPO_INLINE f32v bounded_power(f32v y) { return max_or_second(splat(-1e4f), y); }

// ---- forward ----

struct Sums {
  LaneSum sum, weighted;  // of 2^y and of 2^y y, y = (x - origin) scale
};

struct Terms {
  f32v power, weighted;
};

template <bool kEntropy, bool kBounded>
PPO_INLINE Terms terms_of(f32v x, float origin, float scale) {
  const f32v y = (x - origin) * scale, power = exp2_of(y);
  return {power, kEntropy ? power * (kBounded ? bounded_power(y) : y) : splat(0.0f)};
}

template <bool kEntropy, bool kBounded, class T>
PPO_INLINE Sums sum_terms(const T* x, int n, float origin, float scale) {
  Sums sums;
  const auto add = [&](const Terms& terms) PPO_INLINE_LAMBDA {
    sums.sum.add(terms.power);
    if (kEntropy) sums.weighted.add(terms.weighted);
  };
  int i = 0;
  for (; i + kGroup * kLanes <= n; i += kGroup * kLanes) {
    f32v power[kGroup], weighted[kGroup];
    for (int k = 0; k < kGroup; ++k) {
      const Terms terms = terms_of<kEntropy, kBounded>(load(x + i + k * kLanes), origin, scale);
      power[k] = terms.power;
      weighted[k] = terms.weighted;
    }
    add({sum_in_pairs(power), sum_in_pairs(weighted)});
  }
  for (; i + kLanes <= n; i += kLanes) add(terms_of<kEntropy, kBounded>(load(x + i), origin, scale));
  if (i < n) add(terms_of<kEntropy, true>(load_logits_tail(x + i, n - i), origin, scale));
  return sums;
}

template <bool kEntropy, class T>
PPO_INLINE Sums block_sums(const T* x, int n, float origin, float scale) {
  const Sums sums = sum_terms<kEntropy, false>(x, n, origin, scale);
  if (!kEntropy) return sums;
  // The product of a -inf and its probability, 0, is NaN: where the sum is none, that is all it was.
  const double weighted = sums.weighted.total(), sum = sums.sum.total();
  return weighted == weighted || sum != sum ? sums : sum_terms<kEntropy, true>(x, n, origin, scale);
}

// Sums relative to an origin near the largest logit so far, so that each logit is read from memory once.
template <bool kEntropy, class T>
PPO_INLINE SoftmaxState<double> row_state_of(const LogitRow<T>& row, float inv_temperature) {
  T buffer[kBlock];
  const float scale = inv_temperature * float(kLog2E);
  float origin = -INFINITY;
  Sums row_sums;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int n = row.V - begin < kBlock ? int(row.V - begin) : kBlock;
    const T* x = contiguous_block(row.logits, begin, n, row.stride, buffer);
    if (origin == -INFINITY) origin = block_max(x, n);
    Sums sums = block_sums<kEntropy>(x, n, origin == -INFINITY ? 0.0f : origin, scale);
    const float top = sums.sum.total() <= kLargestSum ? origin : block_max(x, n);
    if (top > origin) {
      const double shift = (double(origin) - top) * scale, factor = std::exp2(shift);
      row_sums.weighted.lanes = factor == 0 ? f64v{} : factor * (row_sums.weighted.lanes + shift * row_sums.sum.lanes);
      row_sums.sum.lanes *= factor;
      origin = top;
      sums = block_sums<kEntropy>(x, n, origin, scale);
    }
    row_sums.sum.lanes += sums.sum.lanes;
    row_sums.weighted.lanes += sums.weighted.lanes;
  }
  return {origin, row_sums.sum.total(), kEntropy ? kLn2 * row_sums.weighted.total() : 0.0};
}

// ---- backward ----

template <bool kEntropy>
PPO_INLINE f32v gradient_of(f32v x, const RowGrad& row) {
  const f32v y = (x - row.max) * row.scale, e = exp2_of(y);
  if (!kEntropy) return e * row.at_zero;
  return e * (row.at_zero - row.slope * bounded_power(y));
}

template <bool kEntropy, class T>
PPO_INLINE void fill_block(const T* x, int n, const RowGrad& row, T* y) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, gradient_of<kEntropy>(load(x + i), row));
  if (i < n) store_tail(y + i, gradient_of<kEntropy>(load_tail(x + i, n - i), row), n - i);
}

template <class T>
PPO_INLINE void fill_row(const LogitRow<T>& row, const RowGrad& grad, T* out, int64_t out_stride) {
  T in_buffer[kBlock], out_buffer[kBlock];
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int n = row.V - begin < kBlock ? int(row.V - begin) : kBlock;
    const T* x = contiguous_block(row.logits, begin, n, row.stride, in_buffer);
    T* y = out_stride == 1 ? out + begin : out_buffer;
    grad.slope == 0 ? fill_block<false>(x, n, grad, y) : fill_block<true>(x, n, grad, y);
    if (out_stride != 1)
      for (int i = 0; i < n; ++i) std::memcpy(out + (begin + i) * out_stride, y + i, sizeof(T));
  }
}

}  // namespace

#define PPO_DEFINE_FOR(T)                                                                               \
  SoftmaxState<double> row_state(const LogitRow<T>& row, float inv_temperature, bool with_entropy) {    \
    return with_entropy ? row_state_of<true>(row, inv_temperature) : row_state_of<false>(row, inv_temperature); \
  }                                                                                                     \
  void fill_gradient(const LogitRow<T>& row, const RowGrad& grad, T* out, int64_t out_stride) {         \
    fill_row(row, grad, out, out_stride);                                                               \
  }
namespace PPO_LEVEL {
PPO_DEFINE_FOR(float)
PPO_DEFINE_FOR(BFloat16)
PPO_DEFINE_FOR(Half)
}  // namespace PPO_LEVEL

}  // namespace ppo_ext
