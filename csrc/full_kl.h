// full_kl.h
// Computes  kl[n] = sum_v p_nv (log p_nv - log q_nv),  p = softmax(x / T) of the policy, q = softmax(x' / T) of the
//           reference. In one read: with y = (x - m) / T, y' = (x' - m') / T, e = exp(y), s = sum e, s' = sum exp(y')
//           and u = sum e (y - y')  it is  kl = u / s - log s + log s'
// Backward  grad_x[n, v] = g_n / T * p_nv (log p_nv - log q_nv - kl[n]);  the reference gets none
#pragma once

#include "logprobs.h"

namespace ppo_ext {

// ---- arguments and results ----

// T is the type of the logits, A that of the arithmetic.
template <class T, class A>
struct KLInputs {
  const T *logits, *ref_logits;
  LogitRows rows, ref_rows;
  const bool* mask;  // may be null: all rows count
  InverseTemperature<A> inv_temperature;
};

// One number a row each, written by the forward pass and read by the backward pass. max is some number near the largest
// logit, and max + log_sum / inv_temperature is the same for any choice of it.
template <class A>
struct KLRowStats {
  A *kl, *max, *log_sum, *ref_max, *ref_log_sum;
};

// What the backward pass reads and writes beyond that. `grad` may be the logits themselves, which are then overwritten.
template <class T, class A>
struct KLGradient {
  const A* grad_kl;
  T* grad;
  LogitRows rows;
};

// ---- one row ----

// The part of a row that was read so far: m, s, m', s' and u as above.
template <class A>
struct KLState {
  A max, sum, ref_max, ref_sum, weighted;
};

template <class A>
PPO_HD KLState<A> kl_empty() {
  return {A(-INFINITY), A(0), A(-INFINITY), A(0), A(0)};
}

// The same part of the row, expressed relative to larger maxima. Sums of 0 mean that only -inf was read so far, and
// -inf - -inf would be NaN.
template <class A>
PPO_HD KLState<A> kl_rescale(KLState<A> state, A max, A ref_max, A inv_temperature) {
  const A ref_shift = (state.ref_max - ref_max) * inv_temperature;
  const A ref_sum = state.ref_sum == A(0) ? A(0) : A(exp(ref_shift)) * state.ref_sum;
  if (state.sum == A(0)) return {max, A(0), ref_max, ref_sum, A(0)};
  const A shift = (state.max - max) * inv_temperature;
  const A factor = exp(shift);
  if (factor == A(0) && state.sum == state.sum) return {max, A(0), ref_max, ref_sum, A(0)};
  // If only -inf of the reference was read so far, u is already +inf, which no finite shift changes.
  const A moved = state.ref_sum == A(0) ? state.weighted : state.weighted + (shift - ref_shift) * state.sum;
  return {max, factor * state.sum, ref_max, ref_sum, factor * moved};
}

template <class A>
PPO_HD KLState<A> kl_merge(KLState<A> a, KLState<A> b, A inv_temperature) {
  const A max = a.max > b.max ? a.max : b.max;
  const A ref_max = a.ref_max > b.ref_max ? a.ref_max : b.ref_max;
  a = kl_rescale(a, max, ref_max, inv_temperature);
  b = kl_rescale(b, max, ref_max, inv_temperature);
  return {max, a.sum + b.sum, ref_max, a.ref_sum + b.ref_sum, a.weighted + b.weighted};
}

// In fp64, as the divergence is a small difference of large terms; it is computed once a row.
template <class A>
PPO_HD A row_kl(const KLState<A>& state) {
  if (state.sum == A(0) || state.ref_sum == A(0)) return A(NAN);  // all logits are -inf: NaN, as in torch
  return A(double(state.weighted) / double(state.sum) + log(double(state.ref_sum) / double(state.sum)));
}

template <class A>
PPO_HD A kl_logit_grad(A p, A log_p, A log_q, A kl, A grad_over_temperature) {
  return grad_over_temperature * p * ((log_p - log_q) - kl);
}

}  // namespace ppo_ext
