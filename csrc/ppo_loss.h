// ppo_loss.h
// Computes  ratio = exp(logprobs - old_logprobs);  pg = max(-A ratio, -A clip(ratio, 1 - c, 1 + c))
//           clipped = max(min(vpreds, values + cv), values - cv);  vf = 0.5 max((vpreds - R)^2, (clipped - R)^2)
//           loss = mean pg + vf_coef mean vf over the counted tokens
// Backward  by the chain rule. As in torch, a max or min of two equal terms gives each half of the gradient, and the
//           clip lets it through at its bounds.
#pragma once

#include "common/moments.h"

namespace ppo_ext {

// ---- arguments and results ----

// Those arguments of the operator that are numbers.
struct PPOCoefficients {
  double cliprange, cliprange_value, vf_coef, ratio_threshold;
};

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
  kGradScale,  // 1 / count, or 0 if skipped: the saved gradients are those of sums and must be multiplied by it
  kPPOStats
};

// One call: `tokens` entries of each array, and the coefficients.
template <class A>
struct PPOJob {
  const A *logprobs, *old_logprobs, *advantages, *vpreds, *values, *returns;
  const bool* mask;
  A *ratio, *counted_advantages, *grad_logprobs, *grad_vpreds;
  A *stats, *loss;
  int64_t tokens;
  PPOCoefficients coefficients;
};

// One call of the backward pass, which multiplies the gradients that the forward pass saved by two factors: the gradient
// of the loss, and stats[kGradScale].
template <class A>
struct PPOBackwardJob {
  const A *grad_loss, *stats, *grad_logprobs, *grad_vpreds;
  A *out_logprobs, *out_vpreds;
  int64_t tokens;
};

// ---- one token ----

template <class A>
struct PPOToken {
  A logprob, old_logprob, advantage, vpred, value, ret;
};

// The quantities of a token whose sums over the counted tokens make the statistics; a Count is 0 or 1. This is their only
// list.
#define PPO_FOR_EACH_SUM(X) \
  X(Sum, pg)                \
  X(Sum, vf)                \
  X(Sum, approxkl)          \
  X(Sum, policykl)          \
  X(Count, pg_clipped)      \
  X(Sum, advantage)         \
  X(Sum, ratio)             \
  X(Sum, vpred)             \
  X(Sum, error)             \
  X(Count, vf_clipped)

// A field for each of them: a token's term, or the sum of the terms.
template <class Sum, class Count = Sum>
struct PPOSummed {
#define PPO_DECLARE(type, name) type name;
  PPO_FOR_EACH_SUM(PPO_DECLARE)
#undef PPO_DECLARE

  // Calls f(field of this, field of the other) for each field.
  template <class OtherSum, class OtherCount, class F>
  PPO_HD void for_each(const PPOSummed<OtherSum, OtherCount>& other, const F& f) {
#define PPO_CALL(type, name) f(name, other.name);
    PPO_FOR_EACH_SUM(PPO_CALL)
#undef PPO_CALL
  }
};

// What one token gives: its terms of the sums, and the gradients of these terms. Those of the loss, which is a mean, are
// smaller by a factor that is known after the last token only (kGradScale).
template <class A>
struct PPOTerms : PPOSummed<A> {
  A grad_logprob, grad_vpred;
};

// The ratio of one token. The CPU's loop computes a vector of them by an exp of its own.
template <class A>
PPO_HD A token_ratio(A logprob, A old_logprob) {
  return exp(logprob - old_logprob);
}

// The clipped surrogate of one token: its value, its derivative by the ratio, and whether the clip decides.
template <class A>
struct PPOSurrogate {
  A loss, slope, clipped;
};

template <class A>
PPO_HD PPOSurrogate<A> clipped_surrogate(A advantage, A ratio, A low, A high) {
  const A zero = Number<A>::of(0), one = Number<A>::of(1);
  const A bounded = min_or_nan(max_or_nan(ratio, low), high);
  const A pg1 = -advantage * ratio, pg2 = -advantage * bounded;
  const A share = share_of_max(pg1, pg2);
  const A through_clip = ratio >= low && ratio <= high ? one - share : zero;
  return {max_or_nan(pg1, pg2), -advantage * (share + through_clip), pg2 > pg1 ? one : zero};
}

// The derivative by the log-ratio. An infinite ratio that the clip cuts off has the gradient 0 and not 0 * inf. A NaN
// ratio still gives NaN.
template <class A>
PPO_HD A by_log_ratio(A slope, A ratio) {
  const A zero = Number<A>::of(0);
  return slope == zero && ratio == ratio ? zero : slope * ratio;
}

template <class A>
PPO_HD void policy_statistics(const PPOToken<A>& x, A ratio, PPOTerms<A>& out) {
  const A d = x.old_logprob - x.logprob;
  out.approxkl = Number<A>::of(0.5) * d * d;
  out.policykl = d;
  out.advantage = x.advantage;
  out.ratio = ratio;
}

template <class A>
PPO_HD void policy_terms(const PPOToken<A>& x, A ratio, const PPOCoefficients& coefficients, PPOTerms<A>& out) {
  const A one = Number<A>::of(1), cliprange = Number<A>::of(coefficients.cliprange);
  const PPOSurrogate<A> surrogate = clipped_surrogate(x.advantage, ratio, one - cliprange, one + cliprange);
  out.pg = surrogate.loss;
  out.pg_clipped = surrogate.clipped;
  out.grad_logprob = by_log_ratio(surrogate.slope, ratio);
  policy_statistics(x, ratio, out);
}

// Twice the penalty of an error, and the derivative of the penalty: of half its square, or with huber_delta > 0 of
// Huber's, which is linear beyond it.
template <class A>
PPO_HD A doubled_penalty(A error, double huber_delta) {
  if (huber_delta == 0) return error * error;
  const A zero = Number<A>::of(0), delta = Number<A>::of(huber_delta), size = error < zero ? -error : error;
  return size > delta ? delta * (size + size - delta) : error * error;
}

template <class A>
PPO_HD A penalty_slope(A error, double huber_delta) {
  if (huber_delta == 0) return error;
  const A delta = Number<A>::of(huber_delta);
  return min_or_nan(max_or_nan(error, -delta), delta);
}

// cliprange_value is INFINITY where the value is not clipped.
template <class A>
PPO_HD void value_terms(const PPOToken<A>& x, double cliprange_value, double huber_delta, double vf_coef,
                        PPOTerms<A>& out) {
  const A zero = Number<A>::of(0), one = Number<A>::of(1);
  const A range = Number<A>::of(cliprange_value);
  const A high = x.value + range, low = x.value - range;
  const A below = min_or_nan(x.vpred, high);
  const A clipped = max_or_nan(below, low);
  const A error1 = x.vpred - x.ret, error2 = clipped - x.ret;
  const A vf1 = doubled_penalty(error1, huber_delta), vf2 = doubled_penalty(error2, huber_delta);
  const A share = share_of_max(vf1, vf2);
  const A through_clip = share_of_max(high, x.vpred) * share_of_max(below, low);
  out.vf = Number<A>::of(0.5) * max_or_nan(vf1, vf2);
  out.vf_clipped = vf2 > vf1 ? one : zero;
  out.vpred = x.vpred;
  out.error = error1 * error1;
  // An infinite error that the clip cuts off has the gradient 0 as well. If the loss is NaN, the gradient is.
  const A slope1 = penalty_slope(error1, huber_delta), slope2 = penalty_slope(error2, huber_delta);
  const A part2 = (one - share) * through_clip;
  const A grad = (share == zero ? zero : share * slope1) + (part2 == zero ? zero : part2 * slope2);
  out.grad_vpred = Number<A>::of(vf_coef) * (out.vf != out.vf ? out.vf : grad);
}

// If all inputs and the ratio are 0, every term must come out as 0. The CPU's loop relies on that: it computes whole
// vectors of tokens, and gives zeros for the masked ones.
template <class A>
PPO_HD PPOTerms<A> ppo_terms(const PPOToken<A>& x, A ratio, const PPOCoefficients& coefficients) {
  PPOTerms<A> out;
  policy_terms(x, ratio, coefficients, out);
  value_terms(x, coefficients.cliprange_value, 0.0, coefficients.vf_coef, out);
  return out;
}

// One token's inputs: read(job.x) gives its entry of an array, on the CPU the entries of a vector of neighbouring
// tokens.
template <class V, class A, class Read>
PPO_HD PPOToken<V> ppo_read(const PPOJob<A>& job, const Read& read) {
  PPOToken<V> x;
  x.logprob = read(job.logprobs);
  x.old_logprob = read(job.old_logprobs);
  x.advantage = read(job.advantages);
  x.vpred = read(job.vpreds);
  x.value = read(job.values);
  x.ret = read(job.returns);
  return x;
}

// The same for its results: write(y, job.y) stores them.
template <class V, class A, class Write>
PPO_HD void ppo_write(const PPOTerms<V>& terms, const PPOJob<A>& job, const Write& write) {
  write(terms.ratio, job.ratio);
  write(terms.advantage, job.counted_advantages);
  write(terms.grad_logprob, job.grad_logprobs);
  write(terms.grad_vpred, job.grad_vpreds);
}

// The backward pass of one token. A gradient of 0, which masked tokens have, stays 0 even if the gradient of the loss is
// inf or NaN. If the minibatch is skipped (grad_scale is 0) all gradients are 0, even if the saved ones are infinite.
template <class A>
PPO_HD A scaled_gradient(A grad, A scale, A grad_scale) {
  return grad_scale == A(0) || grad == A(0) ? A(0) : scale * grad;
}

// ---- sums and statistics ----

// Sums over counted tokens. The weight of `returns` and `values` is the number of tokens.
struct PPOSums : PPOSummed<double> {
  Moments returns, values;
};

template <class A>
PPO_HD PPOSums ppo_sums_of(const PPOToken<A>& x, const PPOTerms<A>& terms) {
  PPOSums sums;
  sums.for_each(terms, [](double& sum, A term) { sum = term; });
  sums.returns = {1.0, double(x.ret), 0.0};
  sums.values = {1.0, double(x.value), 0.0};
  return sums;
}

PPO_HD PPOSums ppo_merge(const PPOSums& a, const PPOSums& b) {
  PPOSums sums = a;
  sums.for_each(b, [](double& sum, double other) { sum += other; });
  sums.returns = moments_merge(a.returns, b.returns);
  sums.values = moments_merge(a.values, b.values);
  return sums;
}

// The statistics that are means over the counted tokens; scale is 1 / count.
template <class A>
PPO_HD void ppo_write_means(const PPOSums& sums, double scale, A* stats) {
  const double count = sums.returns.weight;
  stats[kApproxKL] = A(sums.approxkl * scale);
  stats[kPolicyKL] = A(sums.policykl * scale);
  stats[kClipFrac] = A(sums.pg_clipped * scale);
  stats[kAdvantagesMean] = A(sums.advantage * scale);
  stats[kRatioMean] = A(sums.ratio * scale);
  stats[kReturnsMean] = A(sums.returns.mean);
  stats[kReturnsVar] = A(unbiased_var(count, biased_var(sums.returns)));
  stats[kVPred] = A(sums.vpred * scale);
  stats[kValError] = A(sums.error * scale);
  stats[kValClipFrac] = A(sums.vf_clipped * scale);
  stats[kValMean] = A(sums.values.mean);
  stats[kValVar] = A(unbiased_var(count, biased_var(sums.values)));
}

template <class A>
PPO_HD void ppo_write_stats(const PPOSums& sums, const PPOJob<A>& job) {
  const PPOCoefficients& coefficients = job.coefficients;
  const double count = sums.returns.weight, scale = count > 0 ? 1.0 / count : 0.0;
  const bool skipped = sums.ratio * scale > coefficients.ratio_threshold;
  const double pg = skipped ? 0.0 : sums.pg * scale, vf = skipped ? 0.0 : sums.vf * scale;
  job.stats[kLossPolicy] = A(pg);
  job.stats[kLossValue] = A(vf);
  job.stats[kLossTotal] = *job.loss = A(pg + coefficients.vf_coef * vf);
  job.stats[kSkipped] = skipped ? A(1) : A(0);
  job.stats[kGradScale] = skipped ? A(0) : A(scale);
  ppo_write_means(sums, scale, job.stats);
}

}  // namespace ppo_ext
