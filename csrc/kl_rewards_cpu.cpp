// kl_rewards_cpu.cpp
// Computes  see kl_rewards.h
// Bytes     21 per token in fp32: two log-probabilities, three results and the mask
// Launch    threads over sequences
// Sums      none
// Limits    a sequence in which no token counts drops its score

#include "common/checks.h"
#include "common/parallel.h"
#include "kl_rewards.h"

namespace ppo_ext {
namespace {

template <class A>
struct Job {
  const A *scores, *logprobs, *ref_logprobs;
  const bool* mask;
  A *rewards, *non_score_rewards, *kls;
  int64_t T;
  A kl_coef;
  int64_t kl_penalty;
};

template <class A>
void fill_sequence(const Job<A>& job, int64_t b) {
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

template <class A>
void launch(const Tensor& scores, const Tensor& logprobs, const Tensor& ref_logprobs, const Tensor& mask,
            double kl_coef, int64_t kl_penalty, const Tensor& rewards, const Tensor& non_score_rewards,
            const Tensor& kls) {
  const Job<A> job{pointer<A>(scores),  pointer<A>(logprobs), pointer<A>(ref_logprobs),
                   pointer<bool>(mask), pointer<A>(rewards),  pointer<A>(non_score_rewards),
                   pointer<A>(kls),     logprobs.size(1),     A(kl_coef),
                   kl_penalty};
  parallel_rows(logprobs.size(0), job.T, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) fill_sequence(job, b);
  });
}

std::tuple<Tensor, Tensor, Tensor> kl_rewards_cpu(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask,
                                                  double kl_coef, int64_t kl_penalty) {
  check_kl_rewards(scores, logprobs, ref_logprobs, mask, kl_coef, kl_penalty);
  const auto token = [&] { return new_token_tensor(logprobs, 2, logprobs.scalar_type()); };
  Tensor rewards = token(), non_score_rewards = token(), kls = token();
  const auto f = logprobs.scalar_type() == ScalarType::Double ? launch<double> : launch<float>;
  f(scores, logprobs, ref_logprobs, mask, kl_coef, kl_penalty, rewards, non_score_rewards, kls);
  return {rewards, non_score_rewards, kls};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) { m.impl("_kl_rewards", TORCH_BOX(&kl_rewards_cpu)); }

}  // namespace ppo_ext
