// rollout_weights_cpu.cpp
// Computes  see rollout_weights.h
// Bytes     13 per token in fp32: two log-probabilities, the weight and the mask
// Launch    threads over rows
// Sums      fp64, over rows in their order: same bits for any threads
// Limits    none

#include <vector>

#include "common/parallel.h"
#include "rollout_weights.h"

namespace ppo_ext {
namespace {

template <class A>
RolloutSums fill_row(const RolloutJob<A>& job, int64_t row) {
  const int64_t begin = row * job.T, end = begin + job.T;
  const auto log_ratio = [&](int64_t i) { return double(job.old_logprobs[i]) - double(job.rollout_logprobs[i]); };
  double whole = 0, count = 0;
  if (job.level != kOfToken)
    for (int64_t i = begin; i < end; ++i)
      if (job.mask[i]) {
        whole += log_ratio(i);
        count += 1;
      }
  const double of_row = row_ratio(job.level, whole, count);
  RolloutSums sums{};
  for (int64_t i = begin; i < end; ++i)
    job.weights[i] = job.mask[i] ? rollout_weight(job, job.level == kOfToken ? exp(log_ratio(i)) : of_row, sums) : A(0);
  return sums;
}

struct OnCPU {
  template <class A>
  static void run(const RolloutJob<A>& job, const Tensor&) {
    std::vector<RolloutSums> parts(job.rows);
    parallel_rows(job.rows, job.T, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) parts[row] = fill_row(job, row);
    });
    RolloutSums sums{};
    for (const RolloutSums& part : parts) sums = rollout_merge(sums, part);
    rollout_write_stats(sums, job.stats);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) { m.impl("_rollout_weights", TORCH_BOX(&rollout_weights<OnCPU>)); }

}  // namespace ppo_ext
