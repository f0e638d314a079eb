// full_kl_simd.h: what full_kl_simd.cpp computes of one row of the policy's logits and the reference's, at each level.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/levels.h"
#include "full_kl.h"

namespace ppo_ext {

#define PPO_DECLARE_FOR(T)                                                             \
  KLState<double> row_state(const LogitRowPair<T>& row, const GapScale<float>& scale); \
  void fill_gradient(const LogitRowPair<T>& row, const KLRowGrad<float>& grad, T* out, int64_t out_stride);
#define PPO_DECLARE(level)                     \
  namespace level {                            \
  PPO_DECLARE_FOR(float)                       \
  PPO_DECLARE_FOR(torch::headeronly::BFloat16) \
  PPO_DECLARE_FOR(torch::headeronly::Half)     \
  }
PPO_FOR_EACH_LEVEL(PPO_DECLARE)
#undef PPO_DECLARE
#undef PPO_DECLARE_FOR

}  // namespace ppo_ext
