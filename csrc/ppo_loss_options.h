// ppo_loss_options.h
// Computes  the loss of ppo_loss.h with its options, docs/losses.md: other bounds and forms of the policy term, ratios of
//           sequences, weights, a KL term, an entropy term, other means. The arguments that are absent are null.
// Backward  by the chain rule, as in ppo_loss.h. The ratio of a sequence passes the gradient of its mean log-ratio to
//           all its tokens, for which the loops go over the row once more (ppo_row_gradient).
#pragma once

#include "ppo_loss.h"

namespace ppo_ext {

// ---- arguments and results ----

// The numbers are the places of the names in CHOICES of ppo_ext/ops/_ppo_options.py.
enum PPORatioLevel { kTokenRatio, kSequenceRatio, kSequenceTokenRatio, kPPORatioLevels };
enum PPOPolicyLoss { kClip, kCISPO, kReinforce, kPPOPolicyLosses };
enum PPOKLEstimator { kK1, kK2, kK3, kAbs, kPPOKLEstimators };
enum PPOKLGradient { kExact, kStraightThrough, kWeighted, kPPOKLGradients };
enum PPOValueLoss { kMSE, kHuber, kPPOValueLosses };
enum PPOAggregation { kTokenMean, kRowMeanMean, kRowMeanSum, kRowMeanSumNorm, kTokenSum, kPPOAggregations };

// Absent are: a cliprange_value of INFINITY, and 0 for dual_clip, log_ratio_clamp, norm_length and denominator.
struct PPOOptions {
  double clip_low, clip_high, cliprange_value, vf_coef, ratio_threshold, dual_clip, log_ratio_clamp, kl_coef,
      entropy_coef, huber_delta, norm_length, denominator, scale;
  int ratio_level, policy_loss, kl_estimator, kl_gradient, value_loss, aggregation;

  // Whether a token's results depend on others of its row.
  PPO_HD bool by_row() const {
    return ratio_level != kTokenRatio || (aggregation != kTokenMean && aggregation != kTokenSum);
  }
};

// Which of the options with statistics of their own are given. row_kl, row_entropy: whether the weight of a row makes the
// term another number than the statistic.
struct PPOGiven {
  bool dual_clip, weights, ref_logprobs, entropy, row_kl, row_entropy;
  static constexpr bool always = true;
};

// The number of statistics of a call, see ppo_write_option_stats.
inline int64_t ppo_option_stats(const PPOGiven& given) {
  return kPPOStats + 5 + given.dual_clip + 2 * (given.weights + given.ref_logprobs + given.entropy);
}

template <class A>
struct PPOOptionsJob : PPOJob<A> {
  const A *weights, *ref_logprobs, *entropy;
  const A *denominator, *row_counts;
  A* grad_entropy;
  PPOGiven given;  // the pointers to the data of no tokens are null
  int64_t rows, row_length;
  PPOOptions options;
};

// ---- one row ----

// What the tokens of a row share: their weight in the sums, and for ratios of sequences the ratio, and whether the clamp
// lets the gradient of the log-ratio through (1 or 0).
template <class A>
struct PPORow {
  A weight, ratio, gate;
  double count;
};

// Of a row with `count` tokens that count, whose log-ratios have this sum.
template <class A>
PPO_HD PPORow<A> ppo_row(const PPOOptionsJob<A>& job, int64_t row, double count, double log_ratios) {
  const PPOOptions& options = job.options;
  double weight = 1;
  if (options.aggregation == kRowMeanMean) {
    const double length = job.row_counts ? double(job.row_counts[row]) : count;
    weight = length >= count ? 1 / length : NAN;  // a whole row cannot have fewer tokens than its part
  }
  const double mean = log_ratios / count, clamp = options.log_ratio_clamp;
  const bool below = clamp > 0 && mean < -clamp, above = clamp > 0 && mean > clamp;
  return {A(weight), A(exp(below ? -clamp : above ? clamp : mean)), below || above ? A(0) : A(1), count};
}

// What one token's log-probability gets of the gradient of its sequence's ratio; `slopes` is the sum of grad_row.
template <class A>
PPO_HD A ppo_row_gradient(const PPORow<A>& row, double slopes) {
  return A(slopes / row.count);
}

// ---- one token ----

template <class A>
struct PPOOptionToken : PPOToken<A> {
  A weight, ref_logprob, entropy;
};

// The sums that come with options, and which of PPOGiven they need. Those named loss_ are weighted by the row, like pg
// and vf.
#define PPO_FOR_EACH_OPTION_SUM(X)  \
  X(Sum, k3, always)                \
  X(Count, low, always)             \
  X(Count, high, always)            \
  X(Count, dual, dual_clip)         \
  X(Sum, weight, weights)           \
  X(Count, weight_zero, weights)    \
  X(Sum, loss_kl, row_kl)           \
  X(Sum, ref_kl, ref_logprobs)      \
  X(Sum, loss_entropy, row_entropy) \
  X(Sum, entropy, entropy)

template <class Sum, class Count = Sum>
struct PPOOptionSummed {
#define PPO_DECLARE(type, name, needs) type name;
  PPO_FOR_EACH_OPTION_SUM(PPO_DECLARE)
#undef PPO_DECLARE

  // As PPOSummed::for_each, for the fields that are given.
  template <class OtherSum, class OtherCount, class F>
  PPO_HD void for_each_option(const PPOOptionSummed<OtherSum, OtherCount>& other, const F& f,
                              const PPOGiven& given = {true, true, true, true, true, true}) {
#define PPO_CALL(type, name, needs) \
  if (given.needs) f(name, other.name);
    PPO_FOR_EACH_OPTION_SUM(PPO_CALL)
#undef PPO_CALL
  }
};

// grad_row is the gradient by the log-ratio of the sequence, 0 for other ratios.
template <class A>
struct PPOOptionTerms : PPOTerms<A>, PPOOptionSummed<A> {
  A grad_entropy, grad_row;
};

// exp for the number types of the formulas; simd files specialize it.
template <class A>
struct Exponential {
  static PPO_HD A of(A x) { return exp(x); }
};

template <class A>
PPO_HD A within(A x, double limit) {
  return limit == 0 ? x : min_or_nan(max_or_nan(x, Number<A>::of(-limit)), Number<A>::of(limit));
}

// Whether `within` passes the gradient, as in torch also at its bounds.
template <class A>
PPO_HD A passes(A x, double limit) {
  const A zero = Number<A>::of(0), one = Number<A>::of(1), most = Number<A>::of(limit);
  return limit == 0 ? one : (x > most ? zero : (x < -most ? zero : one));
}

// The policy term of a token. `direct` is its gradient by the log-probability, and `by_ratio` that by the log-ratio.
template <class A>
struct PPOPolicyGradient {
  A direct, by_ratio;
};

template <class A>
PPO_HD PPOPolicyGradient<A> option_policy_terms(const PPOOptionToken<A>& x, A ratio, const PPOOptions& options,
                                                PPOOptionTerms<A>& out) {
  const A zero = Number<A>::of(0), one = Number<A>::of(1);
  const A low = Number<A>::of(1 - options.clip_low), high = Number<A>::of(1 + options.clip_high);
  out.low = out.high = out.dual = zero;
  if (options.policy_loss != kClip) {
    const bool cispo = options.policy_loss == kCISPO;
    const A factor = cispo ? min_or_nan(max_or_nan(ratio, low), high) : one;
    if (cispo) {
      out.low = ratio < low ? one : zero;
      out.high = ratio > high ? one : zero;
    }
    out.pg = -factor * x.advantage * x.logprob;
    out.pg_clipped = out.low + out.high;
    return {-factor * x.advantage, zero};
  }
  const PPOSurrogate<A> surrogate = clipped_surrogate(x.advantage, ratio, low, high);
  out.pg = surrogate.loss;
  out.pg_clipped = surrogate.clipped;
  out.low = x.advantage < zero ? surrogate.clipped : zero;
  out.high = surrogate.clipped - out.low;
  A slope = surrogate.slope;
  if (options.dual_clip > 0) {
    const A most = -x.advantage * Number<A>::of(options.dual_clip);
    const A bounded = min_or_nan(surrogate.loss, most);
    const A share = share_of_max(most, surrogate.loss);  // of the smaller one
    slope = x.advantage < zero ? (share == zero ? zero : share * slope) : slope;
    out.pg = x.advantage < zero ? bounded : out.pg;
    out.dual = x.advantage < zero ? (surrogate.loss > most ? one : zero) : zero;
  }
  return {zero, by_log_ratio(slope, ratio)};
}

// The KL estimate of a token and its gradient by the log-probability. `ratio` is that of the token.
template <class A>
PPO_HD A kl_terms(const PPOOptionToken<A>& x, A ratio, A passes_ratio, const PPOOptions& options,
                  PPOOptionTerms<A>& out) {
  const A zero = Number<A>::of(0), one = Number<A>::of(1), half = Number<A>::of(0.5);
  const A d = x.logprob - x.ref_logprob;
  A kl = d, slope = one;
  if (options.kl_estimator == kK2) {
    kl = half * d * d;
    slope = d;
  } else if (options.kl_estimator == kK3) {
    const A inverse = Exponential<A>::of(-d);
    kl = (inverse - one) + d;
    slope = one - inverse;
  } else if (options.kl_estimator == kAbs) {
    slope = d > zero ? one : (d < zero ? -one : d);
    kl = d < zero ? -d : d;
  }
  if (options.kl_gradient == kStraightThrough) slope = d;
  if (options.kl_gradient == kWeighted) {
    slope = ratio * (passes_ratio * kl + slope);
    kl = ratio * kl;
  }
  out.ref_kl = out.loss_kl = kl;
  return Number<A>::of(options.kl_coef) * slope;
}

// A weight of 0 rejects the token, even if its term is infinite.
template <class A>
PPO_HD A weighted(A weight, A x) {
  const A zero = Number<A>::of(0);
  return weight == zero ? zero : weight * x;
}

// All terms of a token; `row` in the number type of the token.
template <class A, class Job>
PPO_HD PPOOptionTerms<A> ppo_option_terms(const PPOOptionToken<A>& x, const PPORow<A>& row, const Job& job,
                                          const PPOOptions& options) {
  const A zero = Number<A>::of(0), one = Number<A>::of(1);
  PPOOptionTerms<A> out;
  const A d = x.logprob - x.old_logprob;
  const A log_ratio = within(d, options.log_ratio_clamp), passes_token = passes(d, options.log_ratio_clamp);
  const A token = Exponential<A>::of(log_ratio);
  const bool by_token = options.ratio_level == kTokenRatio;
  const A ratio = by_token ? token : row.ratio;
  PPOPolicyGradient<A> grad = option_policy_terms(x, ratio, options, out);
  const A gate = by_token ? passes_token : row.gate;
  grad.by_ratio = gate == zero ? zero : grad.by_ratio;
  out.k3 = (token - one) - log_ratio;
  out.weight = out.weight_zero = out.ref_kl = out.loss_kl = out.entropy = out.loss_entropy = zero;
  if (job.weights) {
    out.pg = weighted(x.weight, out.pg);
    grad = {weighted(x.weight, grad.direct), weighted(x.weight, grad.by_ratio)};
    out.weight = x.weight;
    out.weight_zero = x.weight == zero ? one : zero;
  }
  const bool spreads = options.ratio_level == kSequenceRatio;
  out.grad_row = spreads ? row.weight * grad.by_ratio : zero;
  out.grad_logprob = grad.direct + (spreads ? zero : grad.by_ratio);
  if (job.ref_logprobs) {
    const A slope = kl_terms(x, token, passes_token, options, out);
    if (options.kl_coef != 0) out.grad_logprob += slope;
  }
  if (job.entropy) out.entropy = out.loss_entropy = x.entropy;
  policy_statistics(x, ratio, out);
  PPOToken<A> critic = x;
  if (options.cliprange_value == INFINITY) critic.value = x.vpred;  // then nothing is clipped
  value_terms(critic, options.cliprange_value, options.value_loss == kHuber ? options.huber_delta : 0.0,
              options.vf_coef, out);
  out.grad_logprob *= row.weight;
  out.grad_vpred *= row.weight;
  out.grad_entropy = Number<A>::of(-options.entropy_coef) * row.weight;
  out.pg *= row.weight;
  out.vf *= row.weight;
  out.loss_kl *= row.weight;
  out.loss_entropy *= row.weight;
  return out;
}

// One token's inputs, zeros for those that are absent: read(pointer) gives an entry.
template <class V, class A, class Read>
PPO_HD PPOOptionToken<V> ppo_read_options(const PPOOptionsJob<A>& job, const Read& read) {
  const auto read_given = [&](const A* from) { return from ? read(from) : Number<V>::of(0); };
  PPOOptionToken<V> x;
  static_cast<PPOToken<V>&>(x) = ppo_read<V>(job, read_given);
  x.weight = read_given(job.weights);
  x.ref_logprob = read_given(job.ref_logprobs);
  x.entropy = read_given(job.entropy);
  return x;
}

template <class V, class A, class Write>
PPO_HD void ppo_write_options(const PPOOptionTerms<V>& terms, const PPOOptionsJob<A>& job, const Write& write) {
  const auto write_given = [&](V y, A* to) {
    if (to) write(y, to);
  };
  ppo_write(terms, job, write_given);
  write_given(terms.grad_entropy, job.grad_entropy);
}

}  // namespace ppo_ext
