// logprobs_cuda.cuh: the sums and gradients of logprobs.h on the device, by 2^y, which the special function unit computes.
#pragma once

#include "common/load.cuh"
#include "logprobs.h"

namespace ppo_ext {

template <bool kEntropy, class A, int kCount>
__device__ __forceinline__ void add_logits(SoftmaxState<A>& state, const A (&x)[kCount], A top, A inv_temperature) {
  if (top > state.max) state = softmax_rescale(state, top, inv_temperature);
  const A origin = state.max == A(-INFINITY) ? A(0) : state.max;  // as -inf - -inf would be NaN
  const A scale = inv_temperature * A(kLog2E);
  A sum = 0, weighted = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const A y = (x[k] - origin) * scale;
    const A e = exp2_of(y);
    sum += e;
    if (kEntropy) weighted += e * larger(y, A(-1e4));  // softmax_bounded; a NaN remains in e
  }
  state.sum += sum;
  if (kEntropy) state.weighted += A(kLn2) * weighted;
}

// p (alpha - beta log p) in terms of y = log2(p * sum of the row), which takes one division a row and none an element.
template <bool kEntropy, class A>
struct RowGradient {
  A max, scale, at_zero, slope;

  __device__ __forceinline__ RowGradient(const LogitGrad<A>& grad, A row_max, A log_sum, A inv_temperature)
      : max(row_max), scale(inv_temperature * A(kLog2E)) {
    const A share = exp(-log_sum);
    at_zero = share * (grad.alpha + grad.beta * log_sum);
    slope = share * grad.beta * A(kLn2);
  }

  // With respect to a logit z that is not the label's.
  __device__ __forceinline__ A of(A z) const {
    const A y = (z - max) * scale;
    const A e = exp2_of(y);
    return kEntropy ? e * (at_zero - slope * larger(y, A(-1e4))) : e * at_zero;
  }
};

}  // namespace ppo_ext
