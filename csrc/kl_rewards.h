// kl_rewards.h
// Computes  d = logprobs - ref_logprobs;  kls = d | |d| | d^2 / 2 | given
//           non_score_rewards = -kl_coef kls;  rewards = non_score_rewards + score at the last counted token of the row
#pragma once

#include "common/host_device.h"

namespace ppo_ext {

enum KLPenalty : int64_t { kKL = 0, kAbs = 1, kMSE = 2, kFull = 3 };

// For kFull the caller passes the divergence itself as logprob.
template <class A>
PPO_HD A token_kl(int64_t penalty, A logprob, A ref_logprob) {
  if (penalty == kFull) return logprob;
  const A d = logprob - ref_logprob;
  if (penalty == kAbs) return d < A(0) ? -d : d;
  return penalty == kMSE ? A(0.5) * d * d : d;
}

}  // namespace ppo_ext
