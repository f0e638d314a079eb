// gae.h
// Computes  delta_t = rewards_t + gamma values_{t+1} - values_t
//           advantages_t = delta_t + gamma lam advantages_{t+1},  returns_t = advantages_t + values_t
//           with t + 1 the next counted token; past the last one the value is bootstrap_b, else 0, and the advantage 0;
//           masked tokens are skipped; with lam_returns, returns_t is of advantages with that lambda
#pragma once

#include "common/host_device.h"

namespace ppo_ext {

// One call: B sequences, of T tokens each or, packed one after the other, of offsets[b + 1] - offsets[b] tokens.
template <class A>
struct GAEJob {
  const A *values, *rewards;
  const bool* mask;        // may be null: all tokens count
  const A* bootstrap;      // one a sequence; may be null: 0
  const A* gamma_lams;     // one a sequence; may be null: gamma_lam for all
  const int64_t* offsets;  // of the packed sequences, and the end; may be null
  A *advantages, *returns;
  int64_t B, T, tokens;
  A gamma, gamma_lam, gamma_lam_returns;
  bool decoupled;  // whether the returns have a lambda of their own

  // On CUDA nobody has looked at the offsets; whatever they are, no other memory is read.
  PPO_HD int64_t bound(int64_t b) const {
    const int64_t offset = offsets[b];
    return offset < 0 ? 0 : offset > tokens ? tokens : offset;
  }

  PPO_HD int64_t start(int64_t b) const { return offsets ? bound(b) : b * T; }
  PPO_HD int64_t length(int64_t b) const { return offsets ? bound(b + 1) - bound(b) : T; }
  PPO_HD A bootstrap_of(int64_t b) const { return bootstrap ? bootstrap[b] : A(0); }
  PPO_HD A gamma_lam_of(int64_t b) const { return gamma_lams ? gamma_lams[b] : gamma_lam; }
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
