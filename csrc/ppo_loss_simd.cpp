// ppo_loss_simd.cpp: the tokens of ppo_loss_cpu.cpp, a vector of them at a time, all in registers.
// Sums      fp64, lane by lane; the order depends on the number of tokens only

#include "ppo_loss_simd.h"
#include "common/simd.h"

namespace ppo_ext {
namespace {

// ---- sums of a block ----

template <class A>
struct BlockSums : PPOSummed<LaneSum, LaneCount<A>> {
  using V = vector_of<A>;
  LaneMoments<A> returns, values;

  PPO_INLINE void add(const PPOToken<V>& x, const PPOTerms<V>& terms, condition_of<A> counts) {
    const V weights = counts ? Number<V>::of(1) : Number<V>::of(0);
    this->for_each(terms, [](auto& sum, V term) PPO_INLINE_LAMBDA { sum.add(term); });
    returns.add(x.ret, weights);
    values.add(x.value, weights);
  }

  PPO_INLINE PPOSums sums() const {
    PPOSums result;
    result.for_each(*this, [](double& total, const auto& sum) PPO_INLINE_LAMBDA { total = sum.total(); });
    result.returns = returns.moments();
    result.values = values.moments();
    return result;
  }
};

// ---- tokens ----

PPO_INLINE f32v ratio_of(f32v logprob, f32v old_logprob) { return exp_of(logprob - old_logprob); }

PPO_INLINE f64v ratio_of(f64v logprob, f64v old_logprob) {
  for (int k = 0; k < kLanesOf<double>; ++k) logprob[k] = token_ratio(logprob[k], old_logprob[k]);
  return logprob;
}

// The n tokens from i on: a whole vector, or with kWhole = false the beginning of one.
template <bool kWhole, class A>
PPO_INLINE void fill_vector(const PPOJob<A>& job, const PPOCoefficients& coefficients, int64_t i, int n,
                            BlockSums<A>& sums) {
  using V = vector_of<A>;
  const condition_of<A> counts = kWhole ? lanes_where<A>(job.mask + i) : lanes_where_tail<A>(job.mask + i, n);
  const PPOToken<V> x = ppo_read<V>(job, [&](const A* from) PPO_INLINE_LAMBDA {
    const V entries = kWhole ? load(from + i) : load_tail(from + i, n);
    return counts ? entries : Number<V>::of(0);
  });
  // A masked token is 0 in x and gets a ratio of 0, so that all its terms are 0.
  const V ratio = counts ? ratio_of(x.logprob, x.old_logprob) : Number<V>::of(0);
  const PPOTerms<V> terms = ppo_terms(x, ratio, coefficients);
  sums.add(x, terms, counts);
  ppo_write(terms, job, [&](V value, A* to) PPO_INLINE_LAMBDA {
    const V y = counts ? value : Number<V>::of(0);
    kWhole ? store(to + i, y) : store_tail(to + i, y, n);
  });
}

template <class A>
PPO_INLINE PPOSums fill_tokens(const PPOJob<A>& job, int64_t begin, int64_t end) {
  const auto counts = [&](int64_t i) PPO_INLINE_LAMBDA { return job.mask[i]; };
  // A copy, which stays in registers: the compiler must assume that the results overwrite the job's.
  const PPOCoefficients coefficients = job.coefficients;
  BlockSums<A> sums{};
  sums.returns.origin = first_finite(job.returns, begin, end, counts);
  sums.values.origin = first_finite(job.values, begin, end, counts);
  int64_t i = begin;
  for (; i + kLanesOf<A> <= end; i += kLanesOf<A>) fill_vector<true>(job, coefficients, i, kLanesOf<A>, sums);
  if (i < end) fill_vector<false>(job, coefficients, i, int(end - i), sums);
  return sums.sums();
}

}  // namespace

namespace PPO_LEVEL {
PPOSums fill_block(const PPOJob<float>& job, int64_t begin, int64_t end) { return fill_tokens(job, begin, end); }
PPOSums fill_block(const PPOJob<double>& job, int64_t begin, int64_t end) { return fill_tokens(job, begin, end); }
}  // namespace PPO_LEVEL

}  // namespace ppo_ext
