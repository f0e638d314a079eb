// gae_simd.h: what gae_simd.cpp computes, at each level.
#pragma once

#include "common/levels.h"
#include "gae.h"

namespace ppo_ext {

constexpr int kSequencesOfGroup = 16;

// Runs over `count` <= kSequencesOfGroup sequences from `first` on.
#define PPO_DECLARE(level)                                              \
  namespace level {                                                     \
  void scan_group(const GAEJob<float>& job, int64_t first, int count);  \
  void scan_group(const GAEJob<double>& job, int64_t first, int count); \
  }
PPO_FOR_EACH_LEVEL(PPO_DECLARE)
#undef PPO_DECLARE

}  // namespace ppo_ext
