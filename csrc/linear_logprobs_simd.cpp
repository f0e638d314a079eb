// linear_logprobs_simd.cpp: a row of a tile, a vector of logits at a time
// Sums      groups of 16 vectors in fp32, the groups in fp64, in an order that depends on the width only

#include "linear_logprobs_simd.h"
#include "common/simd.h"

namespace ppo_ext {
namespace {

constexpr int kGroup = 16;  // vectors whose terms are added in fp32

// tanh(x) to about two units in the last place, NaN for NaN: an odd polynomial near 0, beyond that from exp(2 |x|),
// which is infinite where tanh is 1.
PPO_INLINE f32v tanh_of(f32v x) {
  const f32v size = x < 0 ? -x : x, square = x * x;
  f32v p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const f32v near = p * square * x + x, far = 1.0f - 2.0f / (exp_of(size + size) + 1.0f);
  return size < 0.625f ? near : (x < 0 ? -far : far);
}

PPO_INLINE f32v logit_of(f32v x, const LogitMap<float>& map) {
  const f32v scaled = x * map.scale;
  return map.softcap == 0 ? scaled : map.softcap * tanh_of(scaled / map.softcap);
}

PPO_INLINE f32v slope_of(f32v z, const LogitMap<float>& map) {
  const f32v bounded = map.softcap == 0 ? splat(0.0f) : z / map.softcap;
  return map.scale * (1.0f - bounded * bounded);
}

// Calls f(i, load) for each vector of a row; load(p) gives the elements p[i], ... of an array of the row's length.
template <class F>
PPO_INLINE void each_vector(int64_t width, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) f(i, kLanes);
  if (i < width) f(i, int(width - i));
}

PPO_INLINE f32v load_some(const float* p, int n) { return n == kLanes ? load(p) : load_tail(p, n); }
PPO_INLINE void store_some(float* p, f32v x, int n) { n == kLanes ? store(p, x) : store_tail(p, x, n); }

}  // namespace

namespace PPO_LEVEL {

void map_row(float* x, int64_t width, const LogitMap<float>& map) {
  each_vector(width,
              [&](int64_t i, int n) PPO_INLINE_LAMBDA { store_some(x + i, logit_of(load_some(x + i, n), map), n); });
}

// Of the squares of 2^((z - max) scale).
RowStatistics row_statistics(const float* z, int64_t width, float max, float scale) {
  const Powers powers(2 * scale);
  const float origin = max == -INFINITY ? 0.0f : max;
  LaneSum squares, total;
  f32v best = splat(-INFINITY);
  for (int64_t begin = 0; begin < width; begin += kGroup * kLanes) {
    f32v sum{};
    each_vector(width - begin < kGroup * kLanes ? width - begin : kGroup * kLanes,
                [&](int64_t i, int n) PPO_INLINE_LAMBDA {
                  const float* p = z + begin + i;
                  const f32v x = n == kLanes ? load(p) : load_logits_tail(p, n);
                  best = max_or_second(x, best);
                  sum = powers.of_bounded(powers.bounded(x - origin)).plus(sum);
                  total.add(load_some(p, n));
                });
    squares.add(sum);
  }
  return {squares.total(), total.total(), max_lanes(best)};
}

void apply_slope(float* grad, const float* z, int64_t n, const LogitMap<float>& map) {
  each_vector(n, [&](int64_t i, int count) PPO_INLINE_LAMBDA {
    store_some(grad + i, load_some(grad + i, count) * slope_of(load_some(z + i, count), map), count);
  });
}

}  // namespace PPO_LEVEL

}  // namespace ppo_ext
