// masked_simd.h: what masked_simd.cpp computes of n entries and their weights, at each level.
#pragma once

#include "common/levels.h"
#include "masked.h"

namespace ppo_ext {

#define PPO_DECLARE_FOR(A)                                                                                  \
  Moments moments_of(const WeightedEntries<A>& in);                                                         \
  void fill_whitened(const WeightedEntries<A>& in, const Moments& m, const WhitenOptions& options, A* out); \
  GradSums grad_sums_of(const WeightedEntries<A>& in, const A* grad, double mean);                          \
  void fill_gradient(const WeightedEntries<A>& in, const A* grad, const WhitenGrad& all, A* out);
#define PPO_DECLARE(level)                       \
  namespace level {                              \
  PPO_DECLARE_FOR(float) PPO_DECLARE_FOR(double) \
  }
PPO_FOR_EACH_LEVEL(PPO_DECLARE)
#undef PPO_DECLARE
#undef PPO_DECLARE_FOR

}  // namespace ppo_ext
