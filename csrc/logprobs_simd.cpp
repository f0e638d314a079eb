// logprobs_simd.cpp: the rows of logprobs_cpu.cpp, a vector of logits at a time, in blocks that stay in the L1 cache
// Sums      groups of 16 vectors in fp32, the groups in fp64, in an order that depends on V only

#include "logprobs_simd.h"
#include "common/simd.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 2048;
constexpr int kGroup = 16;  // vectors whose terms are added in fp32
// If a block's sum is at most 2^12, so is each of its terms: fp32 holds them well, and the origin need not move.
constexpr double kLargestSum = 4096;

// ---- forward ----

struct Sums {
  LaneSum sum, weighted;  // of e and of e d, d = x - origin, e = 2^(d scale)
};

// Adds the terms of x to sums in fp32. Without kBounds they may become NaN if a logit is -inf (Powers).
template <bool kEntropy, bool kBounds>
PPO_INLINE void add_terms(f32v x, float origin, const Powers& powers, f32v& sum, f32v& weighted) {
  const f32v d = powers.bounded<kBounds>(x - origin);
  const Power e = powers.of_bounded(d);
  sum = e.plus(sum);
  if (kEntropy) weighted += e.value() * d;
}

template <bool kEntropy, bool kBounds, class T>
PPO_INLINE Sums sum_terms(const T* x, int n, float origin, const Powers& powers) {
  Sums sums;
  const auto add = [&](f32v sum, f32v weighted) PPO_INLINE_LAMBDA {
    sums.sum.add(sum);
    if (kEntropy) sums.weighted.add(weighted);
  };
  int i = 0;
  for (const int pairs_end = n - n % (2 * kLanes); i < pairs_end;) {
    f32v sum[2] = {}, weighted[2] = {};
    for (const int end = i + kGroup * kLanes < pairs_end ? i + kGroup * kLanes : pairs_end; i < end; i += 2 * kLanes) {
      const Pair pair = load_pair(x + i);
      for (int half = 0; half < 2; ++half)
        add_terms<kEntropy, kBounds>(pair.x[half], origin, powers, sum[half], weighted[half]);
    }
    add(sum[0] + sum[1], weighted[0] + weighted[1]);
  }
  for (; i < n; i += kLanes) {
    f32v sum{}, weighted{};
    add_terms<kEntropy, true>(i + kLanes <= n ? load(x + i) : load_logits_tail(x + i, n - i), origin, powers, sum,
                              weighted);
    add(sum, weighted);
  }
  return sums;
}

// Sums without bounds first, which is faster. If that gives NaN, a logit may be -inf: `bounds` becomes true, and the
// sums are computed again with bounds.
template <bool kEntropy, class T>
PPO_INLINE Sums block_sums(const T* x, int n, float origin, const Powers& powers, bool& bounds) {
  if (!bounds) {
    const Sums sums = sum_terms<kEntropy, false>(x, n, origin, powers);
    const double sum = sums.sum.total();
    if (sum == sum) return sums;
    bounds = true;
  }
  return sum_terms<kEntropy, true>(x, n, origin, powers);
}

// The sums are relative to an origin near the largest logit so far, which moves if a block has a much larger one. This
// reads each logit from memory once, where a search for the maximum would be a second time.
template <bool kEntropy, class T>
PPO_INLINE SoftmaxState<double> row_state_of(const LogitRow<T>& row, float inv_temperature) {
  T buffer[kBlock];
  const float scale = inv_temperature * float(kLog2E);
  const Powers powers(scale);
  float origin = -INFINITY;
  bool bounds = !Powers::kBoundsAreOptional;
  Sums row_sums;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int n = row.V - begin < kBlock ? int(row.V - begin) : kBlock;
    const T* x = contiguous_block(row.logits, begin, n, row.stride, buffer);
    if (origin == -INFINITY) origin = block_max(x, n);
    Sums sums = block_sums<kEntropy>(x, n, origin == -INFINITY ? 0.0f : origin, powers, bounds);
    const double sum = sums.sum.total();
    const float top = sum >= 0 && sum <= kLargestSum ? origin : block_max(x, n);
    if (top > origin) {
      const double shift = double(origin) - top, factor = std::exp2(shift * scale);
      row_sums.weighted.lanes = factor == 0 ? f64v{} : factor * (row_sums.weighted.lanes + shift * row_sums.sum.lanes);
      row_sums.sum.lanes *= factor;
      origin = top;
      sums = block_sums<kEntropy>(x, n, origin, powers, bounds);
    }
    row_sums.sum.lanes += sums.sum.lanes;
    row_sums.weighted.lanes += sums.weighted.lanes;
  }
  return {origin, row_sums.sum.total(), kEntropy ? kLn2 * scale * row_sums.weighted.total() : 0.0};
}

// ---- backward ----

template <bool kEntropy>
PPO_INLINE f32v gradient_of(f32v x, const RowGrad& row, const Powers& powers) {
  const f32v d = powers.bounded(x - row.max), e = powers.of_bounded(d).value();
  return kEntropy ? e * (row.at_zero - row.slope * (d * row.scale)) : e * row.at_zero;
}

template <bool kEntropy, class T>
PPO_INLINE void fill_block(const T* x, int n, const RowGrad& row, const Powers& powers, T* y) {
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair pair = load_pair(x + i);
    store_pair(y + i, {{gradient_of<kEntropy>(pair.x[0], row, powers), gradient_of<kEntropy>(pair.x[1], row, powers)}});
  }
  for (; i + kLanes <= n; i += kLanes) store(y + i, gradient_of<kEntropy>(load(x + i), row, powers));
  if (i < n) store_tail(y + i, gradient_of<kEntropy>(load_tail(x + i, n - i), row, powers), n - i);
}

template <class T>
PPO_INLINE void fill_row(const LogitRow<T>& row, const RowGrad& given, T* out, int64_t out_stride) {
  T in_buffer[kBlock], out_buffer[kBlock];
  const RowGrad grad{clean(given.max), given.scale, clean(given.at_zero), clean(given.slope)};
  const Powers powers(grad.scale);
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int n = row.V - begin < kBlock ? int(row.V - begin) : kBlock;
    const T* x = contiguous_block(row.logits, begin, n, row.stride, in_buffer);
    T* y = out_stride == 1 ? out + begin : out_buffer;
    grad.slope == 0 ? fill_block<false>(x, n, grad, powers, y) : fill_block<true>(x, n, grad, powers, y);
    if (out_stride != 1)
      for (int i = 0; i < n; ++i) std::memcpy(out + (begin + i) * out_stride, y + i, sizeof(T));
  }
}

}  // namespace

#define PPO_DEFINE_FOR(T)                                                                                       \
  SoftmaxState<double> row_state(const LogitRow<T>& row, float inv_temperature, bool with_entropy) {            \
    return with_entropy ? row_state_of<true>(row, inv_temperature) : row_state_of<false>(row, inv_temperature); \
  }                                                                                                             \
  void fill_gradient(const LogitRow<T>& row, const RowGrad& grad, T* out, int64_t out_stride) {                 \
    fill_row(row, grad, out, out_stride);                                                                       \
  }
namespace PPO_LEVEL {
PPO_DEFINE_FOR(float)
PPO_DEFINE_FOR(BFloat16)
PPO_DEFINE_FOR(Half)
}  // namespace PPO_LEVEL

}  // namespace ppo_ext
