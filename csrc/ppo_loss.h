// ppo_loss.h
// Computes  ratio = exp(logprobs - old_logprobs);  pg = max(-A ratio, -A clip(ratio, 1 - c, 1 + c))
//           clipped = max(min(vpreds, values + cv), values - cv);  vf = 0.5 max((vpreds - R)^2, (clipped - R)^2)
//           loss = mean pg + vf_coef mean vf over the counted tokens
// Backward  by the chain rule, with torch's ties: half to each side of a max or min, everything at the bounds of the clip
#pragma once

#include "masked.h"

namespace ppo_ext {

// The order of STAT_NAMES in ppo_ext/ops/ppo_loss.py.
enum PPOStat {
  kLossPolicy,
  kLossValue,
  kLossTotal,
  kApproxKL,
  kPolicyKL,
  kClipFrac,
  kAdvantagesMean,
  kRatioMean,
  kSkipped,
  kReturnsMean,
  kReturnsVar,
  kVPred,
  kValError,
  kValClipFrac,
  kValMean,
  kValVar,
  kGradScale,  // what the saved per-token gradients still have to be multiplied by: 1 / count, or 0
  kPPOStats
};

template <class A>
struct PPOToken {
  A logprob, old_logprob, advantage, vpred, value, ret;
};

template <class A>
struct PPOTerms {
  A ratio, pg, vf, grad_logprob, grad_vpred;  // grad_vpred without vf_coef
  A pg_clipped, vf_clipped;                   // 1 where the clipped term is the larger one
};

// exp(logprob - old_logprob); the CPU computes many at a time instead.
template <class A>
PPO_HD A token_ratio(A logprob, A old_logprob) {
  return exp(logprob - old_logprob);
}

template <class A>
PPO_HD void policy_terms(const PPOToken<A>& x, A ratio, A cliprange, PPOTerms<A>& out) {
  const A zero = Number<A>::of(0), one = Number<A>::of(1);
  const A low = one - cliprange, high = one + cliprange;
  const A bounded = min_or_nan(max_or_nan(ratio, low), high);
  const A pg1 = -x.advantage * ratio, pg2 = -x.advantage * bounded;
  const A share = share_of_max(pg1, pg2);
  const A through_clip = ratio >= low && ratio <= high ? one - share : zero;
  const A grad_ratio = -x.advantage * (share + through_clip);
  out.ratio = ratio;
  out.pg = max_or_nan(pg1, pg2);
  out.pg_clipped = pg2 > pg1 ? one : zero;
  // 0 * inf would be NaN where an exploded ratio is clipped away; a NaN ratio must still show.
  out.grad_logprob = grad_ratio == zero && ratio == ratio ? zero : grad_ratio * ratio;
}

template <class A>
PPO_HD void value_terms(const PPOToken<A>& x, A cliprange_value, PPOTerms<A>& out) {
  const A zero = Number<A>::of(0), one = Number<A>::of(1);
  const A high = x.value + cliprange_value, low = x.value - cliprange_value;
  const A below = min_or_nan(x.vpred, high);
  const A clipped = max_or_nan(below, low);
  const A error1 = x.vpred - x.ret, error2 = clipped - x.ret;
  const A vf1 = error1 * error1, vf2 = error2 * error2;
  const A share = share_of_max(vf1, vf2);
  const A through_clip = share_of_max(high, x.vpred) * share_of_max(below, low);
  out.vf = Number<A>::of(0.5) * max_or_nan(vf1, vf2);
  out.vf_clipped = vf2 > vf1 ? one : zero;
  // 0 * inf again: a clipped-away error of infinite size has gradient 0, unless it is NaN.
  const A part2 = (one - share) * through_clip;
  const A grad = (share == zero ? zero : share * error1) + (part2 == zero ? zero : part2 * error2);
  out.grad_vpred = out.vf != out.vf ? out.vf : grad;
}

template <class A>
PPO_HD PPOTerms<A> ppo_terms(const PPOToken<A>& x, A ratio, A cliprange, A cliprange_value) {
  PPOTerms<A> out;
  policy_terms(x, ratio, cliprange, out);
  value_terms(x, cliprange_value, out);
  return out;
}

// A skipped minibatch may hold inf, and a masked token's 0 stays 0 whatever gradient the loss receives.
template <class A>
PPO_HD A scaled_gradient(A grad, A scale, A grad_scale) {
  return grad_scale == A(0) || grad == A(0) ? A(0) : scale * grad;
}

// Sums over counted tokens; `returns` and `values` carry the count.
struct PPOSums {
  double pg, vf, approxkl, policykl, clipfrac, advantage, ratio, vpred, error, vf_clipfrac;
  Moments<double> returns, values;
};

PPO_HD PPOSums ppo_merge(const PPOSums& a, const PPOSums& b) {
  return {a.pg + b.pg,
          a.vf + b.vf,
          a.approxkl + b.approxkl,
          a.policykl + b.policykl,
          a.clipfrac + b.clipfrac,
          a.advantage + b.advantage,
          a.ratio + b.ratio,
          a.vpred + b.vpred,
          a.error + b.error,
          a.vf_clipfrac + b.vf_clipfrac,
          moments_merge(a.returns, b.returns),
          moments_merge(a.values, b.values)};
}

template <class A>
PPO_HD void ppo_write_stats(const PPOSums& sums, double vf_coef, double ratio_threshold, A* stats, A* loss) {
  const double count = sums.returns.weight, scale = count > 0 ? 1.0 / count : 0.0;
  const bool skipped = sums.ratio * scale > ratio_threshold;
  const double pg = skipped ? 0.0 : sums.pg * scale, vf = skipped ? 0.0 : sums.vf * scale;
  stats[kLossPolicy] = A(pg);
  stats[kLossValue] = A(vf);
  stats[kLossTotal] = *loss = A(pg + vf_coef * vf);
  stats[kApproxKL] = A(sums.approxkl * scale);
  stats[kPolicyKL] = A(sums.policykl * scale);
  stats[kClipFrac] = A(sums.clipfrac * scale);
  stats[kAdvantagesMean] = A(sums.advantage * scale);
  stats[kRatioMean] = A(sums.ratio * scale);
  stats[kSkipped] = skipped ? A(1) : A(0);
  stats[kReturnsMean] = A(sums.returns.mean);
  stats[kReturnsVar] = A(unbiased_var(count, biased_var(sums.returns)));
  stats[kVPred] = A(sums.vpred * scale);
  stats[kValError] = A(sums.error * scale);
  stats[kValClipFrac] = A(sums.vf_clipfrac * scale);
  stats[kValMean] = A(sums.values.mean);
  stats[kValVar] = A(unbiased_var(count, biased_var(sums.values)));
  stats[kGradScale] = skipped ? A(0) : A(scale);
}

}  // namespace ppo_ext
