// logprobs.h
// Computes  logprobs[n] = (x[n, y_n] - m_n) / T - log s_n,  m_n = max_v x[n, v],  s_n = sum_v exp((x[n, v] - m_n) / T)
//           entropy[n]  = log s_n - t_n / s_n,  t_n = sum_v e_nv (x[n, v] - m_n) / T,  e_nv = exp((x[n, v] - m_n) / T)
//           (both terms of the entropy are >= 0, so nothing cancels)
// Backward  grad_x[n, v] = 1/T * (g_n (1[v = y_n] - p_nv) - h_n p_nv (log p_nv + entropy[n]))
//           with g and h the gradients with respect to logprobs and entropy
// Saved     m_n and log s_n apart: if all logits have a large offset, their sum would lose the bits of log s_n
#pragma once

#include "common/host_device.h"
#include "common/rows.h"
#include "common/temperature.h"

namespace ppo_ext {

// ---- arguments and results ----

// One call of the forward pass. T is the type of the logits, A that of the arithmetic.
template <class T, class A>
struct LogprobsJob {
  const T* logits;
  LogitRows rows;
  const int64_t* labels;
  const bool* mask;  // may be null: all rows count
  InverseTemperature<A> inv_temperature;
  A *logprobs, *entropy, *max, *log_sum;  // one number a row; entropy may be null: it is not computed then
  int64_t* label_note;                    // may be null; see ppo_ext/ops/check_labels.py
};

// One call of the backward pass. `grad` may be the logits themselves, which are then overwritten.
template <class T, class A>
struct LogprobsBackwardJob {
  const T* logits;
  LogitRows rows;
  T* grad;
  LogitRows grad_rows;
  const int64_t* labels;
  const bool* mask;
  const A *grad_logprobs, *grad_entropy;  // either may be null: a gradient of 0
  const A *entropy, *max, *log_sum;       // of the forward pass; entropy is null if grad_entropy is
  InverseTemperature<A> inv_temperature;
};

// ---- one row, forward ----

// The part of a row that was read so far: max m, sum s and weighted sum t as above.
template <class A>
struct SoftmaxState {
  A max, sum, weighted;
};

template <class A>
PPO_HD SoftmaxState<A> softmax_empty() {
  return {A(-INFINITY), A(0), A(0)};
}

// The same part of the row, expressed relative to a larger maximum.
template <class A>
PPO_HD SoftmaxState<A> softmax_rescale(SoftmaxState<A> state, A max, A inv_temperature) {
  if (state.sum == A(0)) return {max, A(0), A(0)};  // only -inf was read so far, and -inf - -inf would be NaN
  const A shift = (state.max - max) * inv_temperature;
  const A factor = exp(shift);
  if (factor == A(0) && state.sum == state.sum) return {max, A(0), A(0)};  // 0 * -inf would be NaN
  return {max, factor * state.sum, factor * (state.weighted + shift * state.sum)};
}

template <class A>
PPO_HD SoftmaxState<A> softmax_merge(SoftmaxState<A> a, SoftmaxState<A> b, A inv_temperature) {
  const A max = a.max > b.max ? a.max : b.max;
  a = softmax_rescale(a, max, inv_temperature);
  b = softmax_rescale(b, max, inv_temperature);
  return {max, a.sum + b.sum, a.weighted + b.weighted};
}

// A row with no probability anywhere has sum 0; its log becomes NaN, as in torch.
template <class A>
PPO_HD A softmax_log_sum(A sum) {
  return sum == A(0) ? A(NAN) : A(log(sum));
}

// y = (x - m) / T may be -inf. Bounded from below, e * y is 0 and not NaN where e = exp(y) is 0. A NaN remains NaN.
template <class A>
PPO_HD A softmax_bounded(A y) {
  return y < A(-1e4) ? A(-1e4) : y;
}

// Halves, as the difference of two finite logits may be too large for A where its quotient by the temperature is not.
template <class A>
PPO_HD A token_logprob(A x, A max, A log_sum, A inv_temperature) {
  return (x * A(0.5) - max * A(0.5)) * (inv_temperature * A(2)) - log_sum;
}

template <class A>
PPO_HD A row_entropy(A sum, A log_sum, A weighted) {
  return log_sum - weighted / sum;
}

// ---- one row, backward ----

// The gradient of a column is p (alpha - beta log p), except for the column of the label, which has token_logit_grad.
template <class A>
struct LogitGrad {
  A alpha, beta;
};

template <class A>
PPO_HD LogitGrad<A> logit_grad_of_row(A grad_logprob, A grad_entropy, A entropy, A inv_temperature) {
  return {-inv_temperature * (grad_logprob + grad_entropy * entropy), inv_temperature * grad_entropy};
}

template <class A>
PPO_HD A token_logit_grad(A logprob, A grad_logprob, A grad_entropy, A entropy, A inv_temperature) {
  const A p = exp(logprob);
  const A entropy_part = p == A(0) ? A(0) : grad_entropy * p * (logprob + entropy);
  return inv_temperature * (-grad_logprob * A(expm1(logprob)) - entropy_part);  // 1 - p without cancellation
}

}  // namespace ppo_ext
