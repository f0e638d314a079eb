// kl_rewards.h
// Computes  d = logprobs - ref_logprobs;  kls = d | |d| | d^2 / 2 | exp(-d) - 1 + d | given
//           non_score_rewards = -kl_coef kls;  rewards = non_score_rewards + score at the last counted token of the row
#pragma once

#include <tuple>

#include "common/checks.h"

namespace ppo_ext {

enum KLPenalty : int64_t {
  kKL,
  kAbs,
  kMSE,
  kFull,
  kK3,
  kKLPenalties
};  // the values of _PENALTIES in ppo_ext/ops/kl_rewards.py

// One call: B sequences of T tokens.
template <class A>
struct KLRewardsJob {
  const A *scores, *logprobs, *ref_logprobs;
  const bool* mask;
  A *rewards, *non_score_rewards, *kls;
  int64_t B, T;
  A kl_coef;
  int64_t kl_penalty;
};

// For kFull the caller passes the divergence itself as logprob.
template <class A>
PPO_HD A token_kl(int64_t penalty, A logprob, A ref_logprob) {
  if (penalty == kFull) return logprob;
  const A d = logprob - ref_logprob;
  if (penalty == kK3) return A(expm1(-d)) + d;
  if (penalty == kAbs) return d < A(0) ? -d : d;
  return penalty == kMSE ? A(0.5) * d * d : d;
}

// ---- the operator ----

inline void check_kl_rewards(const Tensor& scores, const Tensor& logprobs, const Tensor& ref_logprobs,
                             const Tensor& mask, double kl_coef, int64_t kl_penalty) {
  require_finite("kl_rewards", "kl_coef", kl_coef);
  require_float_or_double("kl_rewards", "logprobs", logprobs);
  require_matrix("kl_rewards", "logprobs", logprobs, "[B, T]");
  require_token_tensor("kl_rewards", "scores", scores, logprobs, 1, logprobs.scalar_type());
  require_token_tensors_like("kl_rewards", logprobs, {{"logprobs", logprobs}, {"ref_logprobs", ref_logprobs}});
  require_mask("kl_rewards", mask, logprobs, 2);
  if (kl_penalty < 0 || kl_penalty >= kKLPenalties)
    reject("kl_rewards", "kl_penalty", "be in [0, " + std::to_string(kKLPenalties) + ")", kl_penalty);
}

// The operator _kl_rewards without its loops: it gives `Backend` (kl_rewards_cpu.cpp, kl_rewards_cuda.cu) a job.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> kl_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask,
                                              double kl_coef, int64_t kl_penalty) {
  check_kl_rewards(scores, logprobs, ref_logprobs, mask, kl_coef, kl_penalty);
  Tensor rewards = new_dense_like(logprobs), non_score_rewards = new_dense_like(logprobs),
         kls = new_dense_like(logprobs);
  dispatch_floats(logprobs.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    KLRewardsJob<A> job{};
    job.scores = pointer<A>(scores);
    job.logprobs = pointer<A>(logprobs);
    job.ref_logprobs = pointer<A>(ref_logprobs);
    job.mask = pointer<bool>(mask);
    job.rewards = pointer<A>(rewards);
    job.non_score_rewards = pointer<A>(non_score_rewards);
    job.kls = pointer<A>(kls);
    job.B = logprobs.size(0);
    job.T = logprobs.size(1);
    job.kl_coef = A(kl_coef);
    job.kl_penalty = kl_penalty;
    Backend::run(job, logprobs);
  });
  return {rewards, non_score_rewards, kls};
}

}  // namespace ppo_ext
