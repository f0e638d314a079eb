// logprobs_simd.h: what logprobs_simd.cpp computes of one row of logits, at each level.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/levels.h"
#include "logprobs.h"

namespace ppo_ext {

template <class T>
struct LogitRow {
  const T* logits;
  int64_t stride, V;
};

// The gradient of a column is e (at_zero - slope y), y = (x - max) scale, e = 2^y. The caller corrects the label's
// column.
struct RowGrad {
  float max, scale, at_zero, slope;
};

// max of the state that row_state returns is some number near the largest logit.
#define PPO_DECLARE_FOR(T)                                                                          \
  SoftmaxState<double> row_state(const LogitRow<T>& row, float inv_temperature, bool with_entropy); \
  void fill_gradient(const LogitRow<T>& row, const RowGrad& grad, T* out, int64_t out_stride);
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
