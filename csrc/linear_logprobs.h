// linear_logprobs.h
// Computes  the log-probabilities of logprobs.h for logits z that exist only as tiles, some columns of some rows at a time:
//           x = hidden W^T + bias,   z = scale x, or softcap tanh(scale x / softcap) if there is a softcap
// Fold      adds a tile of x to what was read of its rows before: the sums of logprobs.h, and where they are asked for
//           sum_v exp(2 (z - m) / T), sum_v z, and the largest z with the first id that has it
// Gradient  turns a tile of x into the gradient with respect to x: that of logprobs.h with respect to z, times dz/dx
#pragma once

#include "logprobs.h"

namespace ppo_ext {

// ---- from the product to the logit ----

template <class A>
struct LogitMap {
  A scale, softcap;  // softcap is 0 where there is none

  PPO_HD bool is_identity() const { return scale == A(1) && softcap == A(0); }

  PPO_HD A logit(A x) const {
    const A scaled = scale * x;
    return softcap == A(0) ? scaled : softcap * A(tanh(scaled / softcap));
  }

  // dz/dx, from z.
  PPO_HD A slope(A z) const {
    const A bounded = softcap == A(0) ? A(0) : z / softcap;
    return scale * (A(1) - bounded * bounded);
  }
};

// ---- arguments and results ----

// Some columns of the logits of `rows` rows, before the LogitMap. The rows are dense and begin at multiples of 16 bytes.
template <class A>
struct LogitTile {
  A* x;
  int64_t rows, row_stride, width;
  int64_t first, V;  // the id of the first column, and the size of the vocabulary

  PPO_HD A* row(int64_t n) const { return x + n * row_stride; }
  PPO_HD bool has(int64_t id) const { return id >= first && id < first + width; }
  PPO_HD bool is_last() const { return first + width == V; }
};

// The part of a row that was read so far.
struct LinearState {
  SoftmaxState<double> softmax;
  double squares, total;  // sum_v exp(2 (z - m) / T) and sum_v z
  double target;          // z of the label; NaN before it was read
  double best, best_id;   // the largest z and the first id that has it
};

// What a row gives once all its tiles were read: the columns of a matrix [rows, kLinearResults].
enum LinearResult { kLogprob, kEntropy, kMax, kLogSum, kLogSumSquares, kMean, kIsTop, kLinearResults };

template <class A>
struct LinearFoldJob {
  LogitTile<A> tile;  // may be overwritten
  LogitMap<A> map;
  const int64_t* labels;
  InverseTemperature<A> inv_temperature;
  bool with_entropy, with_statistics;
  LinearState* states;  // one a row; the first tile of a row does not read it
  A* results;           // written with the last tile of a row
};

template <class A>
struct LinearGradientJob {
  LogitTile<A> tile;  // overwritten by the gradient
  LogitMap<A> map;
  const int64_t* labels;
  InverseTemperature<A> inv_temperature;
  const A *grad_logprobs, *grad_entropy;  // grad_entropy may be null: a gradient of 0
  const A *entropy, *max, *log_sum;       // of the forward pass; entropy is null if grad_entropy is
};

// ---- one row ----

PPO_HD LinearState linear_empty() { return {softmax_empty<double>(), 0, 0, NAN, -INFINITY, -1}; }

// The sum of squares relative to a larger maximum.
template <class A>
PPO_HD A squares_at(const SoftmaxState<A>& softmax, A squares, A max, A inv_temperature) {
  return softmax_rescale<A>({softmax.max, squares, A(0)}, max, 2 * inv_temperature).sum;
}

// `later` has ids that come after those of `state`, so that of equal logits the one of `state` is the first.
PPO_HD LinearState linear_merge(const LinearState& state, const LinearState& later, double inv_temperature) {
  const SoftmaxState<double> softmax = softmax_merge(state.softmax, later.softmax, inv_temperature);
  const bool better = later.best > state.best;
  return {softmax,
          squares_at(state.softmax, state.squares, softmax.max, inv_temperature) +
              squares_at(later.softmax, later.squares, softmax.max, inv_temperature),
          state.total + later.total,
          later.target == later.target ? later.target : state.target,
          better ? later.best : state.best,
          better ? later.best_id : state.best_id};
}

template <class A>
PPO_HD void linear_results(const LinearState& state, int64_t label, int64_t V, double inv_temperature, A* results) {
  const SoftmaxState<double>& softmax = state.softmax;
  const double log_sum = softmax_log_sum(softmax.sum);
  const double logprob = token_logprob(state.target, softmax.max, log_sum, inv_temperature);
  const auto put = [&](LinearResult which, double value) { results[which] = A(value); };
  put(kLogprob, logprob);
  put(kEntropy, logprob == logprob ? row_entropy(softmax.sum, log_sum, softmax.weighted) : logprob);
  put(kMax, softmax.max);
  put(kLogSum, log_sum);
  put(kLogSumSquares, log(state.squares) - 2 * log_sum);
  put(kMean, state.total * inv_temperature / double(V));
  put(kIsTop, logprob == logprob && state.best_id == double(label));
}

}  // namespace ppo_ext
