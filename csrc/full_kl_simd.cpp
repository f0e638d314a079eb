// full_kl_simd.cpp: the rows of full_kl_cpu.cpp, a vector of logits at a time, in blocks that stay in the L1 cache
// Sums      groups of 8 vectors in fp32; the groups, and columns with a large share of the row, in fp64

#include "full_kl_simd.h"
#include "common/simd.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 2048;
constexpr int kGroup = 8 * kLanes;  // columns whose terms are added in fp32, in vectors
// If a block's sum is at most 2^12, so is each of its terms: fp32 holds them well, and the origin need not move.
constexpr double kLargestSum = 4096;
// A column with more than this share of the policy's or the reference's sum so far is large. A block has few of them, and
// most of a divergence's rounding error would be theirs, as no others average it out.
constexpr double kLargeShare = 1.0 / 16;

// ---- forward ----

// What distances are relative to: the policy's pivot, the reference's logit there times `shrink`, and a number near the
// reference's largest logit.
struct Origins {
  float policy, shrunk_pivot, ref, shrink;
  Powers powers;
  GapScale<double> wide_scale;
};

// Sums over some vectors in fp32: of e, e' and e gap.
struct VectorSums {
  f32v power, ref_power, weighted;
};

// Without kBounds the sums may become NaN if a logit is -inf (Powers).
template <bool kBounds>
PPO_INLINE void add_terms(f32v x, f32v ref_x, const Origins& origin, VectorSums& sums) {
  const Powers& powers = origin.powers;
  const f32v d = x - origin.policy;
  const Power e = powers.of_bounded(powers.bounded<kBounds>(d));
  const Power ref_e = powers.of_bounded(powers.bounded<kBounds>(ref_x - origin.ref));
  const f32v gap = kl_gap(d, ref_x, origin.shrunk_pivot, origin.shrink);
  // Where the policy's probability is 0 the term is 0, even if the reference's logit is -inf. A NaN remains NaN.
  constexpr bool kInfinityIsPossible = kBounds || !Powers::kBoundsAreOptional;
  sums.power = e.plus(sums.power);
  sums.ref_power = ref_e.plus(sums.ref_power);
  sums.weighted += kInfinityIsPossible && e.value() == splat(0.0f) ? splat(0.0f) : e.value() * gap;
}

template <bool kBounds, class T>
PPO_INLINE VectorSums group_sums(const T* x, const T* ref_x, int n, const Origins& origin) {
  VectorSums sums{};
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair pair = load_pair(x + i), ref_pair = load_pair(ref_x + i);
    for (int half = 0; half < 2; ++half) add_terms<kBounds>(pair.x[half], ref_pair.x[half], origin, sums);
  }
  if (i + kLanes <= n) {
    add_terms<true>(load(x + i), load(ref_x + i), origin, sums);
    i += kLanes;
  }
  if (i < n) add_terms<true>(load_logits_tail(x + i, n - i), load_logits_tail(ref_x + i, n - i), origin, sums);
  return sums;
}

struct Sums {
  LaneSum power, ref_power, weighted;

  PPO_INLINE void add(const VectorSums& sums) {
    power.add(sums.power);
    ref_power.add(sums.ref_power);
    weighted.add(sums.weighted);
  }

  PPO_INLINE void add_to(KLState<double>& state) const {
    state.sum += power.total();
    state.ref_sum += ref_power.total();
    state.weighted += weighted.total();
  }
};

// The powers above which a column is large.
struct Limits {
  f32v power, ref_power;

  static PPO_INLINE Limits of(const KLState<double>& state) {
    return {splat(float(kLargeShare * state.sum)), splat(float(kLargeShare * state.ref_sum))};
  }

  PPO_INLINE i32v above(f32v e, f32v ref_e) const { return (e > power) | (ref_e > ref_power); }
};

PPO_INLINE void add_column(double x, double ref_x, const Origins& origin, KLState<double>& state) {
  const double d = x - origin.policy, e = std::exp(d * origin.wide_scale.inverse);
  state.sum += e;
  state.ref_sum += std::exp((ref_x - origin.ref) * origin.wide_scale.inverse);
  state.weighted += e == 0.0 ? 0.0 : e * kl_gap(d, ref_x, double(origin.shrunk_pivot), origin.wide_scale.shrink);
}

// Adds a group to the state: its large columns one by one, the others as a sum.
template <class T>
PPO_INLINE void add_group(const T* x, const T* ref_x, int n, const Origins& origin, const Limits& limits,
                          KLState<double>& state, Sums& sums) {
  for (int i = 0; i < n; i += kLanes) {
    const int count = n - i < kLanes ? n - i : kLanes;
    VectorSums one{};
    count == kLanes ? add_terms<true>(load(x + i), load(ref_x + i), origin, one)
                    : add_terms<true>(load_logits_tail(x + i, count), load_logits_tail(ref_x + i, count), origin, one);
    const i32v large = limits.above(one.power, one.ref_power);
    if (any_lane(large)) {
      const f32v zero = splat(0.0f);
      one = {large ? zero : one.power, large ? zero : one.ref_power, large ? zero : one.weighted};
      for (int l = 0; l < count; ++l)
        if (large[l]) add_column(float(x[i + l]), float(ref_x[i + l]), origin, state);
    }
    sums.add(one);
  }
}

// The state with a block, whose origins are the state's.
template <bool kBounds, class T>
PPO_INLINE KLState<double> with_block(KLState<double> state, const T* x, const T* ref_x, int n, const Origins& origin) {
  VectorSums groups[kBlock / kGroup];
  f32v power = splat(0.0f), ref_power = power;  // the largest
  Sums all;
  for (int i = 0; i < n; i += kGroup) {
    VectorSums& group = groups[i / kGroup];
    group = group_sums<kBounds>(x + i, ref_x + i, n - i < kGroup ? n - i : kGroup, origin);
    power = max_or_second(group.power, power);
    ref_power = max_or_second(group.ref_power, ref_power);
    all.add(group);
  }
  KLState<double> result = state;
  all.add_to(result);
  const Limits limits = Limits::of(result);
  if (!any_lane(limits.above(power, ref_power))) return result;
  Sums others;
  for (int i = 0; i < n; i += kGroup) {
    const VectorSums& group = groups[i / kGroup];
    if (any_lane(limits.above(group.power, group.ref_power)))
      add_group(x + i, ref_x + i, n - i < kGroup ? n - i : kGroup, origin, limits, state, others);
    else
      others.add(group);
  }
  others.add_to(state);
  return state;
}

// Moves the pivot to the largest of n logits if that is larger, and the reference's maximum likewise.
template <class T>
PPO_INLINE KLState<double> with_larger_origins(const KLState<double>& state, const T* x, const T* ref_x, int n,
                                               const GapScale<double>& scale) {
  const float top = block_max(x, n), ref_top = block_max(ref_x, n);
  const bool larger = top > state.max;
  const double ref_at_max = larger ? kl_pivot(float(ref_x[first_equal(x, n, top)])) : state.ref_at_max;
  return kl_rescale(state, larger ? top : state.max, ref_at_max, ref_top > state.ref_max ? ref_top : state.ref_max,
                    scale);
}

// The sums are relative to origins near the largest logits so far, which move if a block has much larger ones. This
// reads each logit from memory once, where a search for the maxima would be a second time.
template <class T>
PPO_INLINE KLState<double> row_state_of(const LogitRowPair<T>& row, const GapScale<float>& scale) {
  T buffer[kBlock], ref_buffer[kBlock];
  const Powers powers(scale.inverse * float(kLog2E));
  const GapScale<double> wide_scale = GapScale<double>::of(scale.inverse);
  KLState<double> state = kl_empty<double>();
  bool bounds = !Powers::kBoundsAreOptional;  // becomes true when sums without them are NaN
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int n = row.V - begin < kBlock ? int(row.V - begin) : kBlock;
    const T* x = contiguous_block(row.logits, begin, n, row.stride, buffer);
    const T* ref_x = contiguous_block(row.ref_logits, begin, n, row.ref_stride, ref_buffer);
    if (state.max == -INFINITY || state.ref_max == -INFINITY)
      state = with_larger_origins(state, x, ref_x, n, wide_scale);
    const auto read_block = [&]() PPO_INLINE_LAMBDA {
      const Origins origin{state.max == -INFINITY ? 0.0f : float(state.max),
                           float(state.ref_at_max) * scale.shrink,
                           state.ref_max == -INFINITY ? 0.0f : float(state.ref_max),
                           scale.shrink,
                           powers,
                           wide_scale};
      if (!bounds) {
        const KLState<double> with = with_block<false>(state, x, ref_x, n, origin);
        const double all = with.sum + with.ref_sum + with.weighted;
        if (all == all) return with;
        bounds = true;
      }
      return with_block<true>(state, x, ref_x, n, origin);
    };
    KLState<double> with = read_block();
    if (!(with.sum - state.sum <= kLargestSum && with.ref_sum - state.ref_sum <= kLargestSum)) {
      const KLState<double> moved = with_larger_origins(state, x, ref_x, n, wide_scale);
      if (moved.max > state.max || moved.ref_max > state.ref_max) {
        state = moved;
        with = read_block();
      }
    }
    state = with;
  }
  return state;
}

// ---- backward ----

PPO_INLINE f32v gradient_of(f32v x, f32v ref_x, const KLRowGrad<float>& row, const Powers& powers) {
  const f32v d = x - row.max;
  return kl_logit_grad(powers.of(d).value(), d, ref_x, row);
}

template <class T>
PPO_INLINE void fill_row(const LogitRowPair<T>& row, const KLRowGrad<float>& given, T* out, int64_t out_stride) {
  T buffer[kBlock], ref_buffer[kBlock], out_buffer[kBlock];
  const KLRowGrad<float> grad{clean(given.max), clean(given.shrunk_pivot), clean(given.mean_gap), clean(given.share),
                              given.scale};
  const Powers powers(grad.scale.inverse * float(kLog2E));
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    const int n = row.V - begin < kBlock ? int(row.V - begin) : kBlock;
    const T* x = contiguous_block(row.logits, begin, n, row.stride, buffer);
    const T* ref_x = contiguous_block(row.ref_logits, begin, n, row.ref_stride, ref_buffer);
    T* y = out_stride == 1 ? out + begin : out_buffer;
    int i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const Pair pair = load_pair(x + i), ref_pair = load_pair(ref_x + i);
      store_pair(y + i, {{gradient_of(pair.x[0], ref_pair.x[0], grad, powers),
                          gradient_of(pair.x[1], ref_pair.x[1], grad, powers)}});
    }
    for (; i + kLanes <= n; i += kLanes) store(y + i, gradient_of(load(x + i), load(ref_x + i), grad, powers));
    if (i < n)
      store_tail(y + i, gradient_of(load_tail(x + i, n - i), load_tail(ref_x + i, n - i), grad, powers), n - i);
    if (out_stride != 1)
      for (int j = 0; j < n; ++j) std::memcpy(out + (begin + j) * out_stride, y + j, sizeof(T));
  }
}

}  // namespace

#define PPO_DEFINE_FOR(T)                                                                                    \
  KLState<double> row_state(const LogitRowPair<T>& row, const GapScale<float>& scale) {                      \
    return row_state_of(row, scale);                                                                         \
  }                                                                                                          \
  void fill_gradient(const LogitRowPair<T>& row, const KLRowGrad<float>& grad, T* out, int64_t out_stride) { \
    fill_row(row, grad, out, out_stride);                                                                    \
  }
namespace PPO_LEVEL {
PPO_DEFINE_FOR(float)
PPO_DEFINE_FOR(BFloat16)
PPO_DEFINE_FOR(Half)
}  // namespace PPO_LEVEL

}  // namespace ppo_ext
