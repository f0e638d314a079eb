// full_kl_simd.cpp: the rows of full_kl_cpu.cpp, a vector of logits at a time, in blocks that stay in the L1 cache
// Sums      groups of 8 vectors in fp32, the groups in fp64, in an order that depends on V only

#include "full_kl_simd.h"
#include "common/simd.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 2048;
constexpr int kGroup = 8;  // vectors whose terms are added in fp32
// If a block's sum is at most 2^12, so is each of its terms: fp32 holds them well, and the origin need not move.
constexpr double kLargestSum = 4096;

// ---- forward ----

// What distances are relative to: the policy's pivot, the reference's logit there times `shrink`, and a number near the
// reference's largest logit.
struct Origins {
  float policy, shrunk_pivot, ref, shrink;
  Powers powers;
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

struct Sums {
  LaneSum power, ref_power, weighted;

  PPO_INLINE void add(const VectorSums& sums) {
    power.add(sums.power);
    ref_power.add(sums.ref_power);
    weighted.add(sums.weighted);
  }
};

template <bool kBounds, class T>
PPO_INLINE Sums block_sums(const T* x, const T* ref_x, int n, const Origins& origin) {
  Sums sums;
  int i = 0;
  for (const int pairs_end = n - n % (2 * kLanes); i < pairs_end;) {
    VectorSums group{};
    for (const int end = i + kGroup * kLanes < pairs_end ? i + kGroup * kLanes : pairs_end; i < end; i += 2 * kLanes) {
      const Pair pair = load_pair(x + i), ref_pair = load_pair(ref_x + i);
      for (int half = 0; half < 2; ++half) add_terms<kBounds>(pair.x[half], ref_pair.x[half], origin, group);
    }
    sums.add(group);
  }
  for (; i < n; i += kLanes) {
    VectorSums one{};
    i + kLanes <= n ? add_terms<true>(load(x + i), load(ref_x + i), origin, one)
                    : add_terms<true>(load_logits_tail(x + i, n - i), load_logits_tail(ref_x + i, n - i), origin, one);
    sums.add(one);
  }
  return sums;
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
      const Origins origin{state.max == -INFINITY ? 0.0f : float(state.max), float(state.ref_at_max) * scale.shrink,
                           state.ref_max == -INFINITY ? 0.0f : float(state.ref_max), scale.shrink, powers};
      const auto totals = [&](const Sums& sums) PPO_INLINE_LAMBDA {
        return KLState<double>{state.max,     state.ref_at_max,      sums.power.total(), sums.weighted.total(),
                               state.ref_max, sums.ref_power.total()};
      };
      if (!bounds) {
        const KLState<double> block = totals(block_sums<false>(x, ref_x, n, origin));
        const double all = block.sum + block.ref_sum + block.weighted;
        if (all == all) return block;
        bounds = true;
      }
      return totals(block_sums<true>(x, ref_x, n, origin));
    };
    KLState<double> block = read_block();
    if (!(block.sum <= kLargestSum && block.ref_sum <= kLargestSum)) {
      const KLState<double> moved = with_larger_origins(state, x, ref_x, n, wide_scale);
      if (moved.max > state.max || moved.ref_max > state.ref_max) {
        state = moved;
        block = read_block();
      }
    }
    state.sum += block.sum;
    state.ref_sum += block.ref_sum;
    state.weighted += block.weighted;
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
