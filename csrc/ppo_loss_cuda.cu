// ppo_loss_cuda.cu
// Computes  see ppo_loss.h
// Bytes     41 per token in fp32: six inputs, mask, ratio, the counted advantages and two gradients; backward 16
// Launch    blocks of 512 threads, 4 tokens a thread; one kernel up to 2048 tokens, beyond that a second to merge
// Sums      in fp64, variances by Chan's merge, in an order that depends on the number of tokens only
// Limits    none

#include "common/launch.h"
#include "common/reduce.cuh"
#include "ppo_loss_entry.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 512;
constexpr int64_t kTokensPerPart = 2048;
constexpr int64_t kMaxParts = kBlock;  // so that one block merges them, one each thread

// ---- device helpers ----

// Reads and writes entry i of the job's arrays.
struct Entry {
  int64_t i;

  template <class A>
  PPO_HD A operator()(const A* from) const {
    return from[i];
  }

  template <class A>
  PPO_HD void operator()(A value, A* to) const {
    to[i] = value;
  }
};

// Fills the results of token i and gives its terms of the sums.
template <class A>
__device__ __forceinline__ PPOSums fill_token(const PPOJob<A>& job, int64_t i) {
  if (!job.mask[i]) {
    ppo_write(PPOTerms<A>{}, job, Entry{i});  // zeros
    return {};
  }
  const PPOToken<A> x = ppo_read<A>(job, Entry{i});
  const PPOTerms<A> terms = ppo_terms(x, token_ratio(x.logprob, x.old_logprob), job.coefficients);
  ppo_write(terms, job, Entry{i});
  return ppo_sums_of(x, terms);
}

__device__ __forceinline__ PPOSums merge_block(const PPOSums& sums) {
  return reduce_group<kBlock>(sums, [](const PPOSums& a, const PPOSums& b) { return ppo_merge(a, b); });
}

// ---- kernels ----

// With `parts` each block leaves its sums there, without it there is one block, which finishes the statistics.
template <class A>
__global__ void __launch_bounds__(kBlock) ppo_loss_kernel(const PPOJob<A> job, PPOSums* parts) {
  PPOSums sums{};
  for (int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x; i < job.tokens; i += int64_t(gridDim.x) * kBlock)
    sums = ppo_merge(sums, fill_token(job, i));
  sums = merge_block(sums);
  if (threadIdx.x != 0) return;
  if (parts) {
    parts[blockIdx.x] = sums;
  } else {
    ppo_write_stats(sums, job);
  }
}

template <class A>
__global__ void __launch_bounds__(kBlock) finish_kernel(const PPOJob<A> job, const PPOSums* parts, int count) {
  const PPOSums sums = merge_block(int(threadIdx.x) < count ? parts[threadIdx.x] : PPOSums{});
  if (threadIdx.x == 0) ppo_write_stats(sums, job);
}

template <class A>
__global__ void __launch_bounds__(kBlock) backward_kernel(const PPOBackwardJob<A> job) {
  const A grad_scale = job.stats[kGradScale], scale = *job.grad_loss * grad_scale;
  for (int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x; i < job.tokens; i += int64_t(gridDim.x) * kBlock) {
    job.out_logprobs[i] = scaled_gradient(job.grad_logprobs[i], scale, grad_scale);
    job.out_vpreds[i] = scaled_gradient(job.grad_vpreds[i], scale, grad_scale);
  }
}

// ---- launchers ----

struct OnCUDA {
  template <class A>
  static void forward(const PPOJob<A>& job, const Tensor& like) {
    const Launcher launch("ppo_loss", like);
    const int64_t parts = std::max<int64_t>(1, std::min(kMaxParts, divide_up(job.tokens, kTokensPerPart)));
    if (parts == 1) {
      launch(ppo_loss_kernel<A>, 1, kBlock, job, nullptr);
      return;
    }
    const Tensor scratch = new_parts<PPOSums>(like, parts);
    PPOSums* const partial = pointer<PPOSums>(scratch);
    launch(ppo_loss_kernel<A>, parts, kBlock, job, partial);
    launch(finish_kernel<A>, 1, kBlock, job, partial, int(parts));
  }

  template <class A>
  static void backward(const PPOBackwardJob<A>& job, const Tensor& like) {
    const Launcher launch("ppo_loss", like);
    launch(backward_kernel<A>, divide_up(job.tokens, kBlock), kBlock, job);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) {
  m.impl("_ppo_loss", TORCH_BOX(&ppo_loss<OnCUDA>));
  m.impl("_ppo_loss_backward", TORCH_BOX(&ppo_loss_backward<OnCUDA>));
}

}  // namespace ppo_ext
