// ppo_loss_simd.cpp: the tokens of ppo_loss_cpu.cpp, a vector of them at a time, all in registers.
// Sums      fp64, lane by lane; the order depends on the number of tokens only

#include "ppo_loss_simd.h"
#include "common/simd.h"

namespace ppo_ext {
namespace {

// ---- sums of a block ----

template <class A>
struct BlockSums {
  using V = vector_of<A>;
  LaneSum pg, vf, approxkl, policykl, clipfrac, advantage, ratio, vpred, error, vf_clipfrac;
  LaneMoments<A> returns, values;

  // Masked tokens are 0 in x, but not in what is computed from it.
  PPO_INLINE void add(const PPOToken<V>& x, const PPOTerms<V>& terms, condition_of<A> counts) {
    const auto counted = [&](V term) PPO_INLINE_LAMBDA { return counts ? term : Number<V>::of(0); };
    const V weights = counted(Number<V>::of(1)), d = x.old_logprob - x.logprob, value_error = x.vpred - x.ret;
    pg.add(counted(terms.pg));
    vf.add(counted(terms.vf));
    approxkl.add(Number<V>::of(0.5) * d * d);
    policykl.add(d);
    clipfrac.add(counted(terms.pg_clipped));
    advantage.add(x.advantage);
    ratio.add(counted(terms.ratio));
    vpred.add(x.vpred);
    error.add(value_error * value_error);
    vf_clipfrac.add(counted(terms.vf_clipped));
    returns.add(x.ret, weights);
    values.add(x.value, weights);
  }

  PPO_INLINE PPOSums sums() const {
    return {pg.total(),    vf.total(),    approxkl.total(), policykl.total(),    clipfrac.total(),  advantage.total(),
            ratio.total(), vpred.total(), error.total(),    vf_clipfrac.total(), returns.moments(), values.moments()};
  }
};

// ---- tokens ----

PPO_INLINE f32v ratio_of(f32v logprob, f32v old_logprob) { return exp_of(logprob - old_logprob); }

PPO_INLINE f64v ratio_of(f64v logprob, f64v old_logprob) {
  for (int k = 0; k < kLanesOf<double>; ++k) logprob[k] = token_ratio(logprob[k], old_logprob[k]);
  return logprob;
}

// The n tokens from i on, a whole vector or its beginning.
template <bool kWhole, class A>
PPO_INLINE void fill_vector(const PPOJob<A>& job, int64_t i, int n, BlockSums<A>& sums) {
  using V = vector_of<A>;
  bool counted[kLanesOf<A>] = {};
  std::memcpy(counted, job.mask + i, kWhole ? kLanesOf<A> : n);
  const condition_of<A> counts = lanes_where<A>(counted);
  const auto read = [&](const A* from) PPO_INLINE_LAMBDA {
    const V x = kWhole ? load(from + i) : load_tail(from + i, n);
    return counts ? x : Number<V>::of(0);
  };
  const PPOToken<V> x{read(job.logprobs), read(job.old_logprobs), read(job.advantages),
                      read(job.vpreds),   read(job.values),       read(job.returns)};
  const PPOTerms<V> terms = ppo_terms(x, ratio_of(x.logprob, x.old_logprob), Number<V>::of(job.cliprange),
                                      Number<V>::of(job.cliprange_value));
  sums.add(x, terms, counts);
  const auto write = [&](V value, A* to) PPO_INLINE_LAMBDA {
    const V y = counts ? value : Number<V>::of(0);
    kWhole ? store(to + i, y) : store_tail(to + i, y, n);
  };
  write(terms.ratio, job.ratio);
  write(x.advantage, job.counted_advantages);
  write(terms.grad_logprob, job.grad_logprobs);
  write(Number<V>::of(job.vf_coef) * terms.grad_vpred, job.grad_vpreds);
}

template <class A>
PPO_INLINE PPOSums fill_tokens(const PPOJob<A>& job, int64_t begin, int64_t end) {
  const auto counts = [&](int64_t i) PPO_INLINE_LAMBDA { return job.mask[i]; };
  BlockSums<A> sums{};
  sums.returns.origin = first_finite(job.returns, begin, end, counts);
  sums.values.origin = first_finite(job.values, begin, end, counts);
  int64_t i = begin;
  for (; i + kLanesOf<A> <= end; i += kLanesOf<A>) fill_vector<true>(job, i, kLanesOf<A>, sums);
  if (i < end) fill_vector<false>(job, i, int(end - i), sums);
  return sums.sums();
}

}  // namespace

namespace PPO_LEVEL {
PPOSums fill_block(const PPOJob<float>& job, int64_t begin, int64_t end) { return fill_tokens(job, begin, end); }
PPOSums fill_block(const PPOJob<double>& job, int64_t begin, int64_t end) { return fill_tokens(job, begin, end); }
}  // namespace PPO_LEVEL

}  // namespace ppo_ext
