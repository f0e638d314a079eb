// rollout_weights.h
// Computes  d = old_logprobs - rollout_logprobs;  ratio = exp of d (token), of its sum over the row (sequence), or of
//           its mean over the row (geometric);  weights = clip(ratio, low, high) (tis), or ratio where
//           low <= ratio <= high and 0 elsewhere (icepop); 0 where the ratio is NaN; and statistics of both
#pragma once

#include <tuple>

#include "common/checks.h"

namespace ppo_ext {

// The places of the names in _KINDS and _LEVELS of ppo_ext/ops/rollout_weights.py.
enum RolloutKind : int64_t { kTruncated, kRejected, kRolloutKinds };
enum RolloutLevel : int64_t { kOfToken, kOfSequence, kGeometric, kRolloutLevels };

// The order of STAT_NAMES in ppo_ext/ops/rollout_weights.py.
enum RolloutStat { kWeightsMean, kESS, kShareLow, kShareHigh, kShareInvalid, kRatioMax, kRolloutStats };

// One call: `rows` rows of T tokens.
template <class A>
struct RolloutJob {
  const A *old_logprobs, *rollout_logprobs;
  const bool* mask;
  A *weights, *stats;
  int64_t rows, T;
  double low, high;
  int64_t kind, level;
};

// Sums over counted tokens; `most` is the largest ratio.
struct RolloutSums {
  double count, weight, square, low, high, invalid, most;
};

PPO_HD RolloutSums rollout_merge(const RolloutSums& a, const RolloutSums& b) {
  return {a.count + b.count,
          a.weight + b.weight,
          a.square + b.square,
          a.low + b.low,
          a.high + b.high,
          a.invalid + b.invalid,
          a.most > b.most ? a.most : b.most};
}

// The ratio of a row, from the sum of its log-ratios.
PPO_HD double row_ratio(int64_t level, double sum, double count) {
  return exp(level == kGeometric ? sum / count : sum);
}

// The weight of a token, which is added to the sums.
template <class A>
PPO_HD A rollout_weight(const RolloutJob<A>& job, double ratio, RolloutSums& sums) {
  const bool below = ratio<job.low, above = ratio> job.high;
  double weight = below ? job.low : above ? job.high : ratio;
  if (ratio != ratio || (job.kind == kRejected && (below || above))) weight = 0;
  sums = rollout_merge(sums, {1, weight, weight * weight, below ? 1.0 : 0.0, above ? 1.0 : 0.0,
                              ratio != ratio ? 1.0 : 0.0, ratio > 0 ? ratio : 0});
  return A(weight);
}

template <class A>
PPO_HD void rollout_write_stats(const RolloutSums& sums, A* stats) {
  constexpr double kLargest = 3.4028234663852886e38;  // of float32
  const double scale = sums.count > 0 ? 1 / sums.count : 0;
  stats[kWeightsMean] = A(sums.weight * scale);
  stats[kESS] = sums.square > 0 ? A(sums.weight * sums.weight / sums.square * scale) : A(0);
  stats[kShareLow] = A(sums.low * scale);
  stats[kShareHigh] = A(sums.high * scale);
  stats[kShareInvalid] = A(sums.invalid * scale);
  stats[kRatioMax] = A(sums.most > kLargest ? kLargest : sums.most);
}

// ---- the operator ----

inline void check_rollout_weights(const Tensor& old_logprobs, const Tensor& rollout_logprobs, const Tensor& mask,
                                  int64_t kind, int64_t level, double low, double high) {
  const char* const op = "rollout_weights";
  require_float_or_double(op, "old_logprobs", old_logprobs);
  require_token_tensors_like(op, old_logprobs,
                             {{"old_logprobs", old_logprobs}, {"rollout_logprobs", rollout_logprobs}});
  require_mask(op, mask, old_logprobs, old_logprobs.dim());
  if (kind < 0 || kind >= kRolloutKinds) reject(op, "kind", "be in [0, 2)", kind);
  if (level < 0 || level >= kRolloutLevels) reject(op, "level", "be in [0, 3)", level);
  require_finite(op, "high", high);
  if (!(low >= 0 && low <= high)) reject(op, "low", "lie in [0, high]", low);
}

// The operator _rollout_weights without its loops: it gives `Backend` (rollout_weights_cpu.cpp, rollout_weights_cuda.cu)
// a job.
template <class Backend>
std::tuple<Tensor, Tensor> rollout_weights(Tensor old_logprobs, Tensor rollout_logprobs, Tensor mask, int64_t kind,
                                           int64_t level, double low, double high) {
  check_rollout_weights(old_logprobs, rollout_logprobs, mask, kind, level, low, high);
  const int64_t dims = old_logprobs.dim();
  Tensor weights = new_dense_like(old_logprobs);
  Tensor stats = new_tensor(old_logprobs, {kRolloutStats}, old_logprobs.scalar_type());
  dispatch_floats(old_logprobs.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    RolloutJob<A> job{};
    job.old_logprobs = pointer<A>(old_logprobs);
    job.rollout_logprobs = pointer<A>(rollout_logprobs);
    job.mask = pointer<bool>(mask);
    job.weights = pointer<A>(weights);
    job.stats = pointer<A>(stats);
    job.T = dims == 0 ? 1 : old_logprobs.size(dims - 1);
    job.rows = job.T == 0 ? 0 : old_logprobs.numel() / job.T;
    job.low = low;
    job.high = high;
    job.kind = kind;
    job.level = level;
    Backend::run(job, old_logprobs);
  });
  return {weights, stats};
}

}  // namespace ppo_ext
