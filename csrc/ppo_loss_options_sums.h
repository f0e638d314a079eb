// ppo_loss_options_sums.h: the sums of ppo_loss_options.h over tokens and rows, and the statistics that they make.
#pragma once

#include "ppo_loss_options.h"

namespace ppo_ext {

struct PPOOptionSums : PPOSums, PPOOptionSummed<double> {
  double rows, ratio_max, ratio_min;  // rows: those with tokens that count
};

PPO_HD PPOOptionSums ppo_no_option_sums() {
  PPOOptionSums sums{};
  sums.ratio_max = -INFINITY;
  sums.ratio_min = INFINITY;
  return sums;
}

template <class A>
PPO_HD PPOOptionSums ppo_option_sums_of(const PPOOptionToken<A>& x, const PPOOptionTerms<A>& terms) {
  PPOOptionSums sums = ppo_no_option_sums();
  static_cast<PPOSums&>(sums) = ppo_sums_of(x, terms);
  sums.for_each_option(terms, [](double& sum, A term) { sum = term; });
  sums.ratio_max = sums.ratio_min = terms.ratio;
  return sums;
}

PPO_HD PPOOptionSums ppo_option_merge(const PPOOptionSums& a, const PPOOptionSums& b) {
  PPOOptionSums sums = a;
  static_cast<PPOSums&>(sums) = ppo_merge(a, b);
  sums.for_each_option(b, [](double& sum, double other) { sum += other; });
  sums.rows += b.rows;
  sums.ratio_max = max_or_nan(a.ratio_max, b.ratio_max);
  sums.ratio_min = min_or_nan(a.ratio_min, b.ratio_min);
  return sums;
}

// What the weighted sums are multiplied by; NaN if a denominator on the device is not positive.
template <class A>
PPO_HD double ppo_factor(const PPOOptionSums& sums, const PPOOptionsJob<A>& job) {
  const PPOOptions& options = job.options;
  const double count = sums.returns.weight;
  if (!(count > 0)) return 0;
  double total = options.aggregation == kTokenMean ? count : options.aggregation == kTokenSum ? 1 : sums.rows;
  if (options.denominator > 0) total = options.denominator;
  if (job.denominator) total = *job.denominator > A(0) ? double(*job.denominator) : NAN;
  if (options.aggregation == kRowMeanSumNorm)
    total *= options.norm_length > 0 ? options.norm_length : double(job.row_length);
  return options.scale / total;
}

// After PPOStat come the statistics of the options that are given, in the order of OPTION_STAT_NAMES in
// ppo_ext/ops/_ppo_options.py.
template <class A>
PPO_HD void ppo_write_option_stats(const PPOOptionSums& sums, const PPOOptionsJob<A>& job) {
  const PPOOptions& options = job.options;
  const double count = sums.returns.weight, mean = count > 0 ? 1.0 / count : 0.0;
  const bool skipped = sums.ratio * mean > options.ratio_threshold;
  const double factor = skipped ? 0.0 : ppo_factor(sums, job);
  const auto part = [&](double sum) { return skipped ? 0.0 : sum * factor; };
  double loss = part(sums.pg);
  if (job.vpreds) loss += options.vf_coef * part(sums.vf);
  if (options.kl_coef != 0) loss += options.kl_coef * part(sums.loss_kl);
  if (options.entropy_coef != 0) loss -= options.entropy_coef * part(sums.loss_entropy);
  A* const stats = job.stats;
  stats[kLossPolicy] = A(part(sums.pg));
  stats[kLossValue] = A(part(sums.vf));
  stats[kLossTotal] = *job.loss = A(loss);
  stats[kSkipped] = skipped ? A(1) : A(0);
  stats[kGradScale] = A(factor);
  ppo_write_means(sums, mean, stats);
  A* next = stats + kPPOStats;
  const auto add = [&](bool given, double x) {
    if (given) *next++ = A(x);
  };
  add(true, sums.k3 * mean);
  add(true, sums.low * mean);
  add(true, sums.high * mean);
  add(true, count > 0 ? sums.ratio_max : 0);
  add(true, count > 0 ? sums.ratio_min : 0);
  add(job.given.dual_clip, sums.dual * mean);
  add(job.given.weights, sums.weight * mean);
  add(job.given.weights, sums.weight_zero * mean);
  add(job.given.ref_logprobs, part(sums.loss_kl));
  add(job.given.ref_logprobs, sums.ref_kl * mean);
  add(job.given.entropy, part(sums.loss_entropy));
  add(job.given.entropy, sums.entropy * mean);
}

}  // namespace ppo_ext
