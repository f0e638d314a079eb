// rollout_weights_cuda.cu
// Computes  see rollout_weights.h
// Bytes     13 per token in fp32: two log-probabilities, the weight and the mask; for ratios of rows the inputs twice
// Launch    one block of 256 threads per row, at most 256 blocks; a second kernel merges their sums
// Sums      fp64, in an order that depends on the numbers of rows and tokens only
// Limits    none

#include "common/launch.h"
#include "common/reduce.cuh"
#include "rollout_weights.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kMaxParts = kBlock;  // so that one block merges them, one each thread

struct RowTotals {
  double count, log_ratios;
};

// ---- device helpers ----

template <class A>
__device__ __forceinline__ double log_ratio(const RolloutJob<A>& job, int64_t i) {
  return double(job.old_logprobs[i]) - double(job.rollout_logprobs[i]);
}

__device__ __forceinline__ RolloutSums merge_block(const RolloutSums& sums) {
  return reduce_group<kBlock>(sums, [](const RolloutSums& a, const RolloutSums& b) { return rollout_merge(a, b); });
}

template <class A>
__device__ __forceinline__ double ratio_of_row(const RolloutJob<A>& job, int64_t begin) {
  RowTotals totals{0, 0};
  for (int64_t i = begin + threadIdx.x; i < begin + job.T; i += kBlock)
    if (job.mask[i]) totals = {totals.count + 1, totals.log_ratios + log_ratio(job, i)};
  totals = share_first<kBlock>(reduce_group<kBlock>(totals, [](const RowTotals& a, const RowTotals& b) {
    return RowTotals{a.count + b.count, a.log_ratios + b.log_ratios};
  }));
  return row_ratio(job.level, totals.log_ratios, totals.count);
}

// ---- kernels ----

template <class A>
__global__ void __launch_bounds__(kBlock) rollout_weights_kernel(const RolloutJob<A> job, RolloutSums* parts) {
  RolloutSums sums{};
  for (int64_t row = blockIdx.x; row < job.rows; row += gridDim.x) {
    const int64_t begin = row * job.T;
    const double of_row = job.level == kOfToken ? 0 : ratio_of_row(job, begin);
    for (int64_t i = begin + threadIdx.x; i < begin + job.T; i += kBlock)
      job.weights[i] =
          job.mask[i] ? rollout_weight(job, job.level == kOfToken ? exp(log_ratio(job, i)) : of_row, sums) : A(0);
  }
  sums = merge_block(sums);
  if (threadIdx.x == 0) parts[blockIdx.x] = sums;
}

template <class A>
__global__ void __launch_bounds__(kBlock) finish_kernel(const RolloutJob<A> job, const RolloutSums* parts, int count) {
  const RolloutSums sums = merge_block(int(threadIdx.x) < count ? parts[threadIdx.x] : RolloutSums{});
  if (threadIdx.x == 0) rollout_write_stats(sums, job.stats);
}

// ---- launchers ----

struct OnCUDA {
  template <class A>
  static void run(const RolloutJob<A>& job, const Tensor& like) {
    const Launcher launch("rollout_weights", like);
    const int64_t parts = std::max<int64_t>(1, std::min(kMaxParts, job.rows));
    const Tensor scratch = new_parts<RolloutSums>(like, parts);
    RolloutSums* const partial = pointer<RolloutSums>(scratch);
    launch(rollout_weights_kernel<A>, parts, kBlock, job, partial);
    launch(finish_kernel<A>, 1, kBlock, job, partial, int(parts));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) { m.impl("_rollout_weights", TORCH_BOX(&rollout_weights<OnCUDA>)); }

}  // namespace ppo_ext
