// linear_logprobs_simd.h: what linear_logprobs_simd.cpp computes of one row of a tile, at each level.
#pragma once

#include "common/levels.h"
#include "linear_logprobs.h"

namespace ppo_ext {

struct RowStatistics {
  double squares, total, best;  // as in LinearState
};

#define PPO_DECLARE(level)                                                              \
  namespace level {                                                                     \
  void map_row(float* x, int64_t width, const LogitMap<float>& map);                    \
  RowStatistics row_statistics(const float* z, int64_t width, float max, float scale);  \
  void apply_slope(float* grad, const float* z, int64_t n, const LogitMap<float>& map); \
  }
PPO_FOR_EACH_LEVEL(PPO_DECLARE)
#undef PPO_DECLARE

}  // namespace ppo_ext
