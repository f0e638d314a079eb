// gae.h
// Computes  delta_t = rewards_t + gamma values_{t+1} - values_t
//           advantages_t = delta_t + gamma lam advantages_{t+1},  returns_t = advantages_t + values_t
//           with t + 1 the next counted token; past the last one value and advantage are 0; masked tokens are skipped
#pragma once

#include "common/host_device.h"

namespace ppo_ext {

// One call: B sequences of T tokens.
template <class A>
struct GAEJob {
  const A *values, *rewards;
  const bool* mask;  // may be null: all tokens count
  A *advantages, *returns;
  int64_t B, T;
  A gamma, gamma_lam;
};

template <class A>
PPO_HD A gae_delta(A reward, A value, A next_value, A gamma) {
  return (reward + gamma * next_value) - value;
}

template <class A>
PPO_HD A gae_step(A delta, A next_advantage, A gamma_lam) {
  return delta + gamma_lam * next_advantage;
}

// A run of tokens as an affine map: the advantage of its first token is scale * (advantage of the token after it) +
// offset.
template <class A>
struct GAEMap {
  A scale, offset;
};

// The map of two neighbouring runs. Of the two, `later` is applied first, as the recurrence goes from right to left.
template <class A>
PPO_HD GAEMap<A> gae_compose(GAEMap<A> earlier, GAEMap<A> later) {
  return {earlier.scale * later.scale, earlier.offset + earlier.scale * later.offset};
}

}  // namespace ppo_ext
