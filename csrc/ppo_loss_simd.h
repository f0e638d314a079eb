// ppo_loss_simd.h: what ppo_loss_simd.cpp computes, at each level.
#pragma once

#include "common/levels.h"
#include "ppo_loss.h"

namespace ppo_ext {

// Fills the per-token results of tokens [begin, end) and returns their sums.
#define PPO_DECLARE(level)                                                   \
  namespace level {                                                          \
  PPOSums fill_block(const PPOJob<float>& job, int64_t begin, int64_t end);  \
  PPOSums fill_block(const PPOJob<double>& job, int64_t begin, int64_t end); \
  }
PPO_FOR_EACH_LEVEL(PPO_DECLARE)
#undef PPO_DECLARE

}  // namespace ppo_ext
