// ppo_loss_options_simd.h: what ppo_loss_options_simd.cpp computes, at each level.
#pragma once

#include "common/levels.h"
#include "ppo_loss_options_sums.h"

namespace ppo_ext {

// Fills the per-token results of rows [begin, end) and returns their sums. Rows are `length` neighbouring tokens, of
// which the last row may have fewer.
#define PPO_DECLARE(level)                                                                               \
  namespace level {                                                                                      \
  PPOOptionSums fill_rows(const PPOOptionsJob<float>& job, int64_t begin, int64_t end, int64_t length);  \
  PPOOptionSums fill_rows(const PPOOptionsJob<double>& job, int64_t begin, int64_t end, int64_t length); \
  }
PPO_FOR_EACH_LEVEL(PPO_DECLARE)
#undef PPO_DECLARE

}  // namespace ppo_ext
