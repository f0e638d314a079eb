// kl_rewards_cuda.cu
// Computes  see kl_rewards.h
// Bytes     22 per token in fp32: two log-probabilities, three results, and the mask twice
// Launch    one warp per sequence up to T = 1024, else one block of 256 threads
// Sums      none
// Limits    a sequence in which no token counts gets no score: all its rewards are 0

#include "common/launch.h"
#include "common/reduce.cuh"
#include "kl_rewards.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kWarpPerSequence = 1024;

// ---- kernels ----

template <int kThreads, class A>
__global__ void __launch_bounds__(kBlock, 4) kl_rewards_kernel(const KLRewardsJob<A> job) {
  constexpr int kGroups = kBlock / kThreads;
  const int thread = thread_of_group<kThreads>();
  for (int64_t b = int64_t(blockIdx.x) * kGroups + threadIdx.x / kThreads; b < job.B;
       b += int64_t(gridDim.x) * kGroups) {
    const int64_t row = b * job.T;
    int64_t last = -1;
    for (int64_t t = thread; t < job.T; t += kThreads)
      if (job.mask[row + t]) last = t;
    last = reduce_group<kThreads>(last, [](int64_t x, int64_t y) { return x > y ? x : y; });
    last = share_first<kThreads>(last);
    for (int64_t t = thread; t < job.T; t += kThreads) {
      const bool counts = job.mask[row + t];
      const A kl = counts ? token_kl(job.kl_penalty, job.logprobs[row + t], job.ref_logprobs[row + t]) : A(0);
      const A reward = counts ? -job.kl_coef * kl : A(0);
      job.kls[row + t] = kl;
      job.non_score_rewards[row + t] = reward;
      job.rewards[row + t] = t == last ? reward + job.scores[b] : reward;
    }
  }
}

// ---- launchers ----

struct OnCUDA {
  template <class A>
  static void run(const KLRewardsJob<A>& job, const Tensor& like) {
    const Launcher launch("kl_rewards", like);
    if (job.T <= kWarpPerSequence) {
      launch(kl_rewards_kernel<kWarp, A>, job.T == 0 ? 0 : divide_up(job.B, kBlock / kWarp), kBlock, job);
    } else {
      launch(kl_rewards_kernel<kBlock, A>, job.B, kBlock, job);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) { m.impl("_kl_rewards", TORCH_BOX(&kl_rewards<OnCUDA>)); }

}  // namespace ppo_ext
