// masked_simd.cpp: the entries of masked_cpu.cpp, a vector of them at a time, in fp64.
// Sums      lane by lane, in an order that depends on the number of entries only

#include "masked_simd.h"
#include "common/simd.h"

namespace ppo_ext {
namespace {

// Calls f(i, n) for whole vectors of n entries from i on, then once for those that are left.
template <class A, class F>
PPO_INLINE void for_each_vector(int64_t count, const F& f) {
  constexpr int kCount = kLanesOf<A>;
  int64_t i = 0;
  for (; i + kCount <= count; i += kCount) f(i, kCount);
  if (i < count) f(i, int(count - i));
}

template <class A>
PPO_INLINE vector_of<A> load_some(const A* p, int n) {
  return n == kLanesOf<A> ? load(p) : load_tail(p, n);
}

template <class A>
PPO_INLINE void store_some(A* p, vector_of<A> x, int n) {
  n == kLanesOf<A> ? store(p, x) : store_tail(p, x, n);
}

template <class A>
PPO_INLINE Moments entry_moments(const WeightedEntries<A>& in) {
  using V = vector_of<A>;
  LaneMoments<A> moments{};
  moments.origin =
      first_finite(in.values, 0, in.count, [&](int64_t i) PPO_INLINE_LAMBDA { return in.weights[i] != A(0); });
  for_each_vector<A>(in.count, [&](int64_t i, int n) PPO_INLINE_LAMBDA {
    const V w = load_some(in.weights + i, n), x = load_some(in.values + i, n);
    moments.add(w == Number<V>::of(0) ? Number<V>::of(0) : x, w);
  });
  return moments.moments();
}

// Writes f(i, n, weights) for each vector of n entries from i on, but 0 where the weight is 0.
template <class A, class F>
PPO_INLINE void fill_entries(const WeightedEntries<A>& in, A* out, const F& f) {
  using V = vector_of<A>;
  for_each_vector<A>(in.count, [&](int64_t i, int n) PPO_INLINE_LAMBDA {
    const V w = load_some(in.weights + i, n);
    store_some(out + i, w == Number<V>::of(0) ? Number<V>::of(0) : f(i, n, w), n);
  });
}

template <class A>
PPO_INLINE void fill_whitened_entries(const WeightedEntries<A>& in, const Moments& m, const WhitenOptions& options,
                                      A* out) {
  const double scale = whiten_scale(m, options);
  fill_entries(in, out, [&](int64_t i, int n, vector_of<A>) PPO_INLINE_LAMBDA {
    Wide<A> x = widen(load_some(in.values + i, n));
    for (f64v& part : x.part) part = whiten_one(part, m.mean, scale, options);
    return narrow(x);
  });
}

template <class A>
PPO_INLINE GradSums entry_grad_sums(const WeightedEntries<A>& in, const A* grad, double mean) {
  using V = vector_of<A>;
  LaneSum sum, centred;
  for_each_vector<A>(in.count, [&](int64_t i, int n) PPO_INLINE_LAMBDA {
    const V zero = Number<V>::of(0), w = load_some(in.weights + i, n);
    const Wide<A> g = widen(w == zero ? zero : load_some(grad + i, n)),
                  x = widen(w == zero ? zero : load_some(in.values + i, n));
    for (int k = 0; k < Wide<A>::kParts; ++k) {
      sum.lanes += g.part[k];
      centred.lanes += g.part[k] * (x.part[k] - mean);
    }
  });
  return {sum.total(), centred.total()};
}

template <class A>
PPO_INLINE void fill_gradient_entries(const WeightedEntries<A>& in, const A* grad, const WhitenGrad& all, A* out) {
  fill_entries(in, out, [&](int64_t i, int n, vector_of<A> weights) PPO_INLINE_LAMBDA {
    const Wide<A> x = widen(load_some(in.values + i, n)), w = widen(weights);
    Wide<A> g = widen(load_some(grad + i, n));
    for (int k = 0; k < Wide<A>::kParts; ++k) g.part[k] = whiten_grad(g.part[k], x.part[k], w.part[k], all);
    return narrow(g);
  });
}

}  // namespace

#define PPO_DEFINE_FOR(A)                                                                                    \
  Moments moments_of(const WeightedEntries<A>& in) { return entry_moments(in); }                             \
  void fill_whitened(const WeightedEntries<A>& in, const Moments& m, const WhitenOptions& options, A* out) { \
    fill_whitened_entries(in, m, options, out);                                                              \
  }                                                                                                          \
  GradSums grad_sums_of(const WeightedEntries<A>& in, const A* grad, double mean) {                          \
    return entry_grad_sums(in, grad, mean);                                                                  \
  }                                                                                                          \
  void fill_gradient(const WeightedEntries<A>& in, const A* grad, const WhitenGrad& all, A* out) {           \
    fill_gradient_entries(in, grad, all, out);                                                               \
  }
namespace PPO_LEVEL {
PPO_DEFINE_FOR(float)
PPO_DEFINE_FOR(double)
}  // namespace PPO_LEVEL

}  // namespace ppo_ext
