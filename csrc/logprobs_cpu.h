// logprobs_cpu.h: one row of logits on the CPU, in fp64 and, by logprobs_simd.cpp, in fp32 arithmetic.
#pragma once

#include <algorithm>
#include <cmath>

#include "logprobs_simd.h"

namespace ppo_ext {

constexpr int64_t kDoubleBlock = 2048;

// ---- one row, fp64 arithmetic ----

inline SoftmaxState<double> row_state(const LogitRow<double>& row, double inv_temperature, bool with_entropy) {
  SoftmaxState<double> state = softmax_empty<double>();
  const auto logit = [&](int64_t v) { return row.logits[v * row.stride]; };
  for (int64_t v = 0; v < row.V; ++v) state.max = logit(v) > state.max ? logit(v) : state.max;
  const double origin = state.max == -INFINITY ? 0.0 : state.max;
  for (int64_t begin = 0; begin < row.V; begin += kDoubleBlock) {
    double sum = 0, weighted = 0;  // of a block, so that rounding errors grow with the block and not with V
    for (int64_t v = begin; v < std::min(begin + kDoubleBlock, row.V); ++v) {
      const double y = (logit(v) - origin) * inv_temperature, e = std::exp(y);
      sum += e;
      if (with_entropy) weighted += e * softmax_bounded(y);
    }
    state.sum += sum;
    state.weighted += weighted;
  }
  return state;
}

inline void fill_gradient(const LogitRow<double>& row, const LogitGrad<double>& grad, double max, double log_sum,
                          double inv_temperature, double* out, int64_t out_stride) {
  for (int64_t v = 0; v < row.V; ++v) {
    const double log_p = token_logprob(row.logits[v * row.stride], max, log_sum, inv_temperature);
    out[v * out_stride] = std::exp(log_p) * (grad.alpha - grad.beta * softmax_bounded(log_p));
  }
}

// ---- one row, fp32 arithmetic ----

template <class T>
SoftmaxState<double> row_state(const LogitRow<T>& row, float inv_temperature, bool with_entropy) {
  return PPO_AT_LEVEL(row_state, row, inv_temperature, with_entropy);
}

// p (alpha - beta log p) as a function of the distance to the largest logit.
template <class T>
inline void fill_gradient(const LogitRow<T>& row, const LogitGrad<float>& grad, float max, float log_sum,
                          float inv_temperature, T* out, int64_t out_stride) {
  const double share = std::exp(-double(log_sum)), at_zero = share * (grad.alpha + double(grad.beta) * log_sum);
  const RowGrad from_max{max, inv_temperature * float(kLog2E), float(at_zero), float(share * grad.beta * kLn2)};
  PPO_AT_LEVEL(fill_gradient, row, from_max, out, out_stride);
}

}  // namespace ppo_ext
