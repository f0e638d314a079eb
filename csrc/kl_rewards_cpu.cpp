// kl_rewards_cpu.cpp
// Computes  see kl_rewards.h
// Bytes     21 per token in fp32: two log-probabilities, three results and the mask
// Launch    threads over sequences
// Sums      none
// Limits    a sequence in which no token counts gets no score: all its rewards are 0

#include "common/parallel.h"
#include "kl_rewards.h"

namespace ppo_ext {
namespace {

template <class A>
void fill_sequence(const KLRewardsJob<A>& job, int64_t b) {
  int64_t last = -1;
  for (int64_t i = b * job.T; i < (b + 1) * job.T; ++i) {
    const bool counts = job.mask[i];
    const A kl = counts ? token_kl(job.kl_penalty, job.logprobs[i], job.ref_logprobs[i]) : A(0);
    const A reward = counts ? -job.kl_coef * kl : A(0);
    job.kls[i] = kl;
    job.non_score_rewards[i] = reward;
    job.rewards[i] = reward;
    if (counts) last = i;
  }
  if (last >= 0) job.rewards[last] += job.scores[b];
}

struct OnCPU {
  template <class A>
  static void run(const KLRewardsJob<A>& job, const Tensor&) {
    parallel_rows(job.B, job.T, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) fill_sequence(job, b);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) { m.impl("_kl_rewards", TORCH_BOX(&kl_rewards<OnCPU>)); }

}  // namespace ppo_ext
