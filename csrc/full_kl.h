// full_kl.h
// Computes  kl[n] = sum_v p_nv (log p_nv - log q_nv),  p = softmax(x / T) of the policy, q = softmax(x' / T) of the
//           reference. In one read: with the pivot t, the column of a logit near the policy's largest one, m' near the
//           reference's largest, gap_v = (x_v - x_t) / T - (x'_v - x'_t) / T, e = exp((x - x_t) / T), s = sum e,
//           s' = sum exp((x' - m') / T) and mean = sum e gap / s  it is
//               kl = mean + (m' - x'_t) / T + log s' - log s
// Backward  grad_x[n, v] = g_n / T * p_nv (gap_nv - mean_n);  the reference gets none
// Gaps      Each of the two differences is taken within one side: x - x' would lose the side that is smaller. At the
//           pivot the gap is 0, so nothing is left of a row whose other columns have no probability.
#pragma once

#include "logprobs.h"

namespace ppo_ext {

// ---- arguments and results ----

// 1 / T, and the same as the product of a power of 2 and a rest. Logits times `shrink` keep all their bits, and no gap
// of these overflows.
template <class A>
struct GapScale {
  A inverse, shrink, rest;

  static PPO_HD GapScale of(A inverse) {
    const A shrink = ldexp(A(1), inverse < A(1) ? ilogb(inverse) - 20 : -20);
    return {inverse, shrink, inverse / shrink};
  }
};

// T is the type of the logits, A that of the arithmetic.
template <class T, class A>
struct KLInputs {
  const T *logits, *ref_logits;
  LogitRows rows, ref_rows;
  const bool* mask;  // may be null: all rows count
  InverseTemperature<A> inv_temperature;
};

// A row of the policy's logits and the reference's.
template <class T>
struct LogitRowPair {
  const T *logits, *ref_logits;
  int64_t stride, ref_stride, V;
};

template <class T, class A>
PPO_HD LogitRowPair<T> row_pair(const KLInputs<T, A>& in, int64_t n) {
  LogitRowPair<T> row;
  row.logits = in.logits + in.rows.offset(n);
  row.ref_logits = in.ref_logits + in.ref_rows.offset(n);
  row.stride = in.rows.stride_v;
  row.ref_stride = in.ref_rows.stride_v;
  row.V = in.rows.V;
  return row;
}

// One number a row each, written by the forward pass and read by the backward pass: x_t, s, x'_t and mean.
template <class A>
struct KLRowStats {
  A *max, *sum, *ref_at_max, *mean_gap;
};

// What the backward pass reads and writes beyond that. `grad` may be the logits themselves, which are then overwritten.
template <class T, class A>
struct KLGradient {
  const A* grad_kl;
  T* grad;
  LogitRows rows;
};

// ---- one row, forward ----

// The part of a row that was read so far: x_t, x'_t, s, sum e gap, m' and s' as above, the gaps times T * shrink.
template <class A>
struct KLState {
  A max, ref_at_max, sum, weighted, ref_max, ref_sum;
};

template <class A>
PPO_HD KLState<A> kl_empty() {
  return {A(-INFINITY), A(0), A(0), A(0), A(-INFINITY), A(0)};
}

// x'_t as a pivot: no gap is relative to -inf. If the reference has no probability there, kl is +inf anyway.
template <class A>
PPO_HD A kl_pivot(A ref_x) {
  return ref_x == A(-INFINITY) ? A(0) : ref_x;
}

// A gap times T * shrink, from d = x - x_t and x'_t * shrink. V may be a vector of A.
template <class V, class A>
PPO_HD V kl_gap(V d, V ref_x, A shrunk_pivot, A shrink) {
  return d * shrink - (ref_x * shrink - shrunk_pivot);
}

// The same part of the row, expressed relative to another pivot and a larger maximum of the reference. Sums of 0 mean
// that only -inf was read so far, and -inf - -inf would be NaN.
template <class A>
PPO_HD KLState<A> kl_rescale(KLState<A> state, A max, A ref_at_max, A ref_max, GapScale<A> scale) {
  const A ref_shift = (state.ref_max - ref_max) * scale.inverse;
  const A ref_sum = state.ref_sum == A(0) ? A(0) : A(exp(ref_shift)) * state.ref_sum;
  const KLState<A> nothing = {max, ref_at_max, A(0), A(0), ref_max, ref_sum};
  if (state.sum == A(0)) return nothing;
  const A factor = exp((state.max - max) * scale.inverse);
  if (factor == A(0) && state.sum == state.sum) return nothing;
  const A shift = kl_gap(state.max - max, state.ref_at_max, ref_at_max * scale.shrink, scale.shrink);
  return {max, ref_at_max, factor * state.sum, factor * (state.weighted + shift * state.sum), ref_max, ref_sum};
}

template <class A>
PPO_HD KLState<A> kl_merge(KLState<A> a, KLState<A> b, GapScale<A> scale) {
  const A max = a.max >= b.max ? a.max : b.max, ref_at_max = a.max >= b.max ? a.ref_at_max : b.ref_at_max;
  const A ref_max = a.ref_max > b.ref_max ? a.ref_max : b.ref_max;
  a = kl_rescale(a, max, ref_at_max, ref_max, scale);
  b = kl_rescale(b, max, ref_at_max, ref_max, scale);
  return {max, ref_at_max, a.sum + b.sum, a.weighted + b.weighted, ref_max, a.ref_sum + b.ref_sum};
}

// Rows of so few columns are read in fp64: no error of a power is averaged out, and the divergence may be a thousandth of
// the terms that it is the difference of.
constexpr int64_t kFewColumns = 8;
constexpr int64_t kColumnsOfSum = 2048;  // whose terms are added up first: errors grow with them and not with V

// The whole row at once, in fp64.
template <class T>
PPO_HD KLState<double> kl_state_of_row(const LogitRowPair<T>& row, GapScale<double> scale) {
  KLState<double> state = kl_empty<double>();
  for (int64_t v = 0; v < row.V; ++v) {
    const double x = double(row.logits[v * row.stride]), ref_x = double(row.ref_logits[v * row.ref_stride]);
    if (x > state.max) {
      state.max = x;
      state.ref_at_max = kl_pivot(ref_x);
    }
    state.ref_max = ref_x > state.ref_max ? ref_x : state.ref_max;
  }
  const double origin = state.max == -INFINITY ? 0.0 : state.max,
               ref_origin = state.ref_max == -INFINITY ? 0.0 : state.ref_max;
  for (int64_t begin = 0; begin < row.V; begin += kColumnsOfSum) {
    const int64_t end = begin + kColumnsOfSum < row.V ? begin + kColumnsOfSum : row.V;
    double sum = 0, ref_sum = 0, weighted = 0;
    for (int64_t v = begin; v < end; ++v) {
      const double d = double(row.logits[v * row.stride]) - origin, ref_x = double(row.ref_logits[v * row.ref_stride]);
      const double e = exp(d * scale.inverse);
      sum += e;
      ref_sum += exp((ref_x - ref_origin) * scale.inverse);
      weighted += e == 0.0 ? 0.0 : e * kl_gap(d, ref_x, state.ref_at_max * scale.shrink, scale.shrink);
    }
    state.sum += sum;
    state.ref_sum += ref_sum;
    state.weighted += weighted;
  }
  return state;
}

template <class A>
struct KLRow {
  A kl, mean_gap;
};

// In fp64, as the divergence is a small difference of large terms; it is computed once a row. A row that is NaN has a
// gradient of NaN.
template <class A>
PPO_HD KLRow<A> kl_of_row(const KLState<A>& state, GapScale<A> scale) {
  if (state.sum == A(0) || state.ref_sum == A(0)) return {A(NAN), A(NAN)};  // all logits are -inf: NaN, as in torch
  const double mean = double(state.weighted) / double(state.sum) * double(scale.rest);
  const double from_pivot =
      double(state.ref_max) * double(scale.shrink) - double(state.ref_at_max) * double(scale.shrink);
  const double kl = mean + (from_pivot * double(scale.rest) + log(double(state.ref_sum) / double(state.sum)));
  return {A(kl), kl == kl ? A(mean) : A(NAN)};
}

// ---- one row, backward ----

template <class A>
struct KLRowGrad {
  A max, shrunk_pivot, mean_gap, share;  // share: the incoming gradient over the row's sum
  GapScale<A> scale;
};

template <class A>
PPO_HD KLRowGrad<A> kl_grad_of_row(A grad_kl, A max, A sum, A ref_at_max, A mean_gap, GapScale<A> scale) {
  return {max, ref_at_max * scale.shrink, mean_gap, grad_kl / sum, scale};
}

// The gradient of a column, from d = x - x_t and e = exp(d / T). 1 / T comes last: share / T may overflow where the
// product does not. V may be a vector of A.
template <class V, class A>
PPO_HD V kl_logit_grad(V e, V d, V ref_x, const KLRowGrad<A>& row) {
  const V gap = kl_gap(d, ref_x, row.shrunk_pivot, row.scale.shrink) * row.scale.rest;
  return e == V{} ? V{} : e * row.share * (gap - row.mean_gap) * row.scale.inverse;
}

}  // namespace ppo_ext
