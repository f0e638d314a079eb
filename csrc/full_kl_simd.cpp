// full_kl_simd.cpp: the rows of full_kl_cpu.cpp, a vector of logits at a time, in blocks that stay in the first cache.
// Sums      8 vectors in fp32, the rest in fp64, in an order that depends on V only

#include "full_kl_simd.h"
#include "simd.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 2048;
constexpr int kGroup = 8;  // vectors whose terms are added in fp32
// How far, in powers of 2, a logit may exceed its origin before the block is redone: the divergence is a small difference,
// and what the origins are off by adds to the terms of it.
constexpr float kSlack = 0.5f;

// ---- forward ----

// The policy's and the reference's origins, and the powers of 2 of distances to them.
struct Origins {
  float policy, ref;
  Powers powers;
};

// In fp32, of some vectors: e, e' and e (d - d'), d = x - origin, e = 2^(d scale), and the largest logits. Without bounds
// a -inf gives NaN where bounds are optional.
struct VectorSums {
  f32v power, ref_power, weighted, top, ref_top;
};

template <bool kBounds>
PPO_INLINE void add_terms(f32v x, f32v ref_x, const Origins& origin, VectorSums& sums) {
  sums.top = max_or_second(x, sums.top);
  sums.ref_top = max_or_second(ref_x, sums.ref_top);
  const Powers& powers = origin.powers;
  const Power e = powers.of_bounded(powers.bounded<kBounds>(x - origin.policy));
  const Power ref_e = powers.of_bounded(powers.bounded<kBounds>(ref_x - origin.ref));
  // d - d' from x - x', which loses nothing where the two are close. Where the policy has no probability the term is 0,
  // even against a -inf of the reference; a NaN stays.
  const f32v gap = (x - ref_x) - (origin.policy - origin.ref);
  sums.power = e.plus(sums.power);
  sums.ref_power = ref_e.plus(sums.ref_power);
  sums.weighted += e.value() == splat(0.0f) ? splat(0.0f) : e.value() * gap;
}

struct Sums {
  LaneSum power, ref_power, weighted;
  f32v top = splat(-INFINITY), ref_top = top;

  PPO_INLINE VectorSums next() const { return {splat(0.0f), splat(0.0f), splat(0.0f), top, ref_top}; }

  PPO_INLINE void add(const VectorSums& sums) {
    power.add(sums.power);
    ref_power.add(sums.ref_power);
    weighted.add(sums.weighted);
    top = sums.top;
    ref_top = sums.ref_top;
  }
};

template <bool kBounds, class T>
PPO_INLINE KLState<double> block_state(const T* x, const T* ref_x, int n, const Origins& origin, float scale) {
  Sums sums;
  int i = 0;
  for (; i + kGroup * kLanes <= n; i += kGroup * kLanes) {
    VectorSums group = sums.next();
    for (int k = 0; k < kGroup; k += 2) {
      const Pair pair = load_pair(x + i + k * kLanes), ref_pair = load_pair(ref_x + i + k * kLanes);
      for (int half = 0; half < 2; ++half) add_terms<kBounds>(pair.x[half], ref_pair.x[half], origin, group);
    }
    sums.add(group);
  }
  for (; i < n; i += kLanes) {
    VectorSums one = sums.next();
    i + kLanes <= n ? add_terms<true>(load(x + i), load(ref_x + i), origin, one)
                    : add_terms<true>(load_logits_tail(x + i, n - i), load_logits_tail(ref_x + i, n - i), origin, one);
    sums.add(one);
  }
  return {max_lanes(sums.top), sums.power.total(), max_lanes(sums.ref_top), sums.ref_power.total(),
          kLn2 * scale * sums.weighted.total()};
}

PPO_INLINE bool exceeds(double top, double origin, float scale) { return top > origin && !((top - origin) * scale <= kSlack); }

// The sums are taken relative to origins near the largest logits so far, so that each logit is read from memory once.
template <class T>
PPO_INLINE KLState<double> row_state_of(const LogitRowPair<T>& row, float inv_temperature) {
  T buffer[kBlock], ref_buffer[kBlock];
  const float scale = inv_temperature * float(kLog2E);
  const Powers powers(scale);
  KLState<double> state = kl_empty<double>();  // its maxima are the origins
  double max = -INFINITY, ref_max = -INFINITY;
  bool bounds = !Powers::kBoundsAreOptional;  // true from the block on that shows that it takes them
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int n = row.V - begin < kBlock ? int(row.V - begin) : kBlock;
    const T* x = contiguous_block(row.logits, begin, n, row.stride, buffer);
    const T* ref_x = contiguous_block(row.ref_logits, begin, n, row.ref_stride, ref_buffer);
    if (state.max == -INFINITY) state.max = block_max(x, n);
    if (state.ref_max == -INFINITY) state.ref_max = block_max(ref_x, n);
    const auto read_block = [&]() PPO_INLINE_LAMBDA {
      const Origins origin{state.max == -INFINITY ? 0.0f : float(state.max),
                           state.ref_max == -INFINITY ? 0.0f : float(state.ref_max), powers};
      if (!bounds) {
        const KLState<double> block = block_state<false>(x, ref_x, n, origin, scale);
        if (block.sum + block.ref_sum == block.sum + block.ref_sum) return block;
        bounds = true;
      }
      return block_state<true>(x, ref_x, n, origin, scale);
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

PPO_INLINE f32v gradient_of(f32v x, f32v ref_x, const KLRowGrad<float>& r, const Powers& powers) {
  const f32v log_p = (x - r.max) * r.inv_temperature - r.log_sum;
  const f32v log_q = (ref_x - r.ref_max) * r.inv_temperature - r.ref_log_sum;
  const f32v p = powers.of(log_p).value();
  return p == splat(0.0f) ? splat(0.0f) : r.grad_over_temperature * p * ((log_p - log_q) - r.kl);
}

template <class T>
PPO_INLINE void fill_row(const LogitRowPair<T>& row, const KLRowGrad<float>& grad, T* out, int64_t out_stride) {
  T buffer[kBlock], ref_buffer[kBlock], out_buffer[kBlock];
  const Powers powers{float(kLog2E)};
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int n = row.V - begin < kBlock ? int(row.V - begin) : kBlock;
    const T* x = contiguous_block(row.logits, begin, n, row.stride, buffer);
    const T* ref_x = contiguous_block(row.ref_logits, begin, n, row.ref_stride, ref_buffer);
    T* y = out_stride == 1 ? out + begin : out_buffer;
    int i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const Pair pair = load_pair(x + i), ref_pair = load_pair(ref_x + i);
      store_pair(y + i, {{gradient_of(pair.x[0], ref_pair.x[0], grad, powers), gradient_of(pair.x[1], ref_pair.x[1], grad, powers)}});
    }
    for (; i + kLanes <= n; i += kLanes) store(y + i, gradient_of(load(x + i), load(ref_x + i), grad, powers));
    if (i < n) store_tail(y + i, gradient_of(load_tail(x + i, n - i), load_tail(ref_x + i, n - i), grad, powers), n - i);
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
