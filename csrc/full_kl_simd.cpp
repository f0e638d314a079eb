// full_kl_simd.cpp: the rows of full_kl_cpu.cpp, a vector of logits at a time, in blocks that stay in the first cache.
// Sums      8 vectors in fp32, in pairs, the rest in fp64, in an order that depends on V only

#include "full_kl_simd.h"
#include "simd.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 2048;
constexpr int kGroup = 8;  // vectors whose terms are added in fp32, in pairs
// How far, in powers of 2, a logit may exceed its origin before the block is redone: the divergence is a small difference,
// and what the origins are off by adds to the terms of it.
constexpr float kSlack = 0.5f;

// ---- forward ----

// The policy's and the reference's origins; what they multiply their distances with is the same.
struct Origins {
  float policy, ref, scale;
};

struct Terms {
  f32v power, ref_power, weighted;  // as in KLState, in powers of 2
};

struct Sums {
  LaneSum sum, ref_sum, weighted;
  f32v top, ref_top;

  PPO_INLINE void add(const Terms& terms) {
    sum.add(terms.power);
    ref_sum.add(terms.ref_power);
    weighted.add(terms.weighted);
  }

  PPO_INLINE KLState<double> state() const {
    return {max_lanes(top), sum.total(), max_lanes(ref_top), ref_sum.total(), kLn2 * weighted.total()};
  }
};

PPO_INLINE Terms terms_of(f32v x, f32v ref_x, const Origins& origin, Sums& sums) {
  sums.top = max_or_second(x, sums.top);
  sums.ref_top = max_or_second(ref_x, sums.ref_top);
  const f32v power = exp2_of((x - origin.policy) * origin.scale), ref_power = exp2_of((ref_x - origin.ref) * origin.scale);
  // y - y' from x - x', which loses nothing where the two are close. Where the policy has no probability the term is 0,
  // even against a -inf of the reference; a NaN stays.
  const f32v gap = ((x - ref_x) - (origin.policy - origin.ref)) * origin.scale;
  return {power, ref_power, power == splat(0.0f) ? splat(0.0f) : power * gap};
}

template <class T>
PPO_INLINE KLState<double> block_state(const T* x, const T* ref_x, int n, const Origins& origin) {
  Sums sums{{}, {}, {}, splat(-INFINITY), splat(-INFINITY)};
  int i = 0;
  for (; i + kGroup * kLanes <= n; i += kGroup * kLanes) {
    f32v power[kGroup], ref_power[kGroup], weighted[kGroup];
    for (int k = 0; k < kGroup; ++k) {
      const Terms terms = terms_of(load(x + i + k * kLanes), load(ref_x + i + k * kLanes), origin, sums);
      power[k] = terms.power;
      ref_power[k] = terms.ref_power;
      weighted[k] = terms.weighted;
    }
    sums.add({sum_in_pairs(power), sum_in_pairs(ref_power), sum_in_pairs(weighted)});
  }
  for (; i + kLanes <= n; i += kLanes) sums.add(terms_of(load(x + i), load(ref_x + i), origin, sums));
  if (i < n) sums.add(terms_of(load_logits_tail(x + i, n - i), load_logits_tail(ref_x + i, n - i), origin, sums));
  return sums.state();
}

PPO_INLINE bool exceeds(double top, double origin, float scale) { return top > origin && !((top - origin) * scale <= kSlack); }

// The sums are taken relative to origins near the largest logits so far, so that each logit is read from memory once.
template <class T>
PPO_INLINE KLState<double> row_state_of(const LogitRowPair<T>& row, float inv_temperature) {
  T buffer[kBlock], ref_buffer[kBlock];
  const float scale = inv_temperature * float(kLog2E);
  KLState<double> state = kl_empty<double>();  // its maxima are the origins
  double max = -INFINITY, ref_max = -INFINITY;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int n = row.V - begin < kBlock ? int(row.V - begin) : kBlock;
    const T* x = contiguous_block(row.logits, begin, n, row.stride, buffer);
    const T* ref_x = contiguous_block(row.ref_logits, begin, n, row.ref_stride, ref_buffer);
    if (state.max == -INFINITY) state.max = block_max(x, n);
    if (state.ref_max == -INFINITY) state.ref_max = block_max(ref_x, n);
    const auto read_block = [&]() PPO_INLINE_LAMBDA {
      return block_state(x, ref_x, n, {state.max == -INFINITY ? 0.0f : float(state.max),
                                       state.ref_max == -INFINITY ? 0.0f : float(state.ref_max), scale});
    };
    KLState<double> block = read_block();
    const bool moves = exceeds(block.max, state.max, scale), ref_moves = exceeds(block.ref_max, state.ref_max, scale);
    if (moves || ref_moves) {
      state = kl_rescale(state, moves ? block.max : state.max, ref_moves ? block.ref_max : state.ref_max, double(inv_temperature));
      block = read_block();
    }
    max = block.max > max ? block.max : max;
    ref_max = block.ref_max > ref_max ? block.ref_max : ref_max;
    state.sum += block.sum;
    state.ref_sum += block.ref_sum;
    state.weighted += block.weighted;
  }
  return kl_rescale(state, max > -INFINITY ? max : state.max, ref_max > -INFINITY ? ref_max : state.ref_max, double(inv_temperature));
}

// ---- backward ----

PPO_INLINE f32v gradient_of(f32v x, f32v ref_x, const KLRowGrad<float>& r) {
  const f32v log_p = (x - r.max) * r.inv_temperature - r.log_sum;
  const f32v log_q = (ref_x - r.ref_max) * r.inv_temperature - r.ref_log_sum;
  const f32v p = exp2_of(log_p * float(kLog2E));
  return p == splat(0.0f) ? splat(0.0f) : r.grad_over_temperature * p * ((log_p - log_q) - r.kl);
}

template <class T>
PPO_INLINE void fill_row(const LogitRowPair<T>& row, const KLRowGrad<float>& grad, T* out, int64_t out_stride) {
  T buffer[kBlock], ref_buffer[kBlock], out_buffer[kBlock];
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int n = row.V - begin < kBlock ? int(row.V - begin) : kBlock;
    const T* x = contiguous_block(row.logits, begin, n, row.stride, buffer);
    const T* ref_x = contiguous_block(row.ref_logits, begin, n, row.ref_stride, ref_buffer);
    T* y = out_stride == 1 ? out + begin : out_buffer;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, gradient_of(load(x + i), load(ref_x + i), grad));
    if (i < n) store_tail(y + i, gradient_of(load_tail(x + i, n - i), load_tail(ref_x + i, n - i), grad), n - i);
    if (out_stride != 1)
      for (int j = 0; j < n; ++j) std::memcpy(out + (begin + j) * out_stride, y + j, sizeof(T));
  }
}

}  // namespace

#define PPO_DEFINE_FOR(T)                                                                                               \
  KLState<double> row_state(const LogitRowPair<T>& row, float inv_temperature) { return row_state_of(row, inv_temperature); } \
  void fill_gradient(const LogitRowPair<T>& row, const KLRowGrad<float>& grad, T* out, int64_t out_stride) {              \
    fill_row(row, grad, out, out_stride);                                                                               \
  }
namespace PPO_LEVEL {
PPO_DEFINE_FOR(float)
PPO_DEFINE_FOR(BFloat16)
PPO_DEFINE_FOR(Half)
}  // namespace PPO_LEVEL

}  // namespace ppo_ext
