// masked_entry.h: the operators _masked_moments, _masked_whiten and _masked_whiten_backward without their loops: they
//                 check the arguments, make the results, and call `Backend` (masked_cpu.cpp, masked_cuda.cu).
#pragma once

#include <tuple>

#include "common/checks.h"
#include "masked.h"

namespace ppo_ext {

inline void check_weighted(const char* op, const Tensor& values, const Tensor& weights) {
  require_float_or_double(op, "values", values);
  require_token_tensors_like(op, values, {{"values", values}, {"weights", weights}});
}

template <class A>
WeightedEntries<A> weighted_entries(const Tensor& values, const Tensor& weights) {
  WeightedEntries<A> in;
  in.values = pointer<A>(values);
  in.weights = pointer<A>(weights);
  in.count = values.numel();
  return in;
}

// The moments of each row of [R, C] values.
template <class Backend>
Tensor masked_moments(Tensor values, Tensor weights) {
  check_weighted("masked_mean", values, weights);
  require_matrix("masked_mean", "values", values, "[R, C]");
  Tensor moments = new_tensor(values, {values.size(0), kSavedMoments}, values.scalar_type());
  dispatch_floats(values.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    Backend::moments(weighted_entries<A>(values, weights), values.size(0), pointer<A>(moments), values);
  });
  return moments;
}

inline WhitenOptions whiten_options(int64_t mode, bool unbiased, double eps) {
  if (mode < 0 || mode >= kWhitenModes)
    reject("masked_whiten", "mode", "be in [0, " + std::to_string(kWhitenModes) + ")", mode);
  require_positive("masked_whiten", "eps", eps);
  return {mode, unbiased, eps};
}

template <class Backend>
std::tuple<Tensor, Tensor> masked_whiten(Tensor values, Tensor weights, int64_t mode, bool unbiased, double eps) {
  const WhitenOptions options = whiten_options(mode, unbiased, eps);
  check_weighted("masked_whiten", values, weights);
  Tensor whitened = new_dense_like(values), moments = new_tensor(values, {kSavedMoments}, values.scalar_type());
  dispatch_floats(values.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    Backend::whiten(weighted_entries<A>(values, weights), options, pointer<A>(whitened), pointer<A>(moments), values);
  });
  return {whitened, moments};
}

// `moments` are those that masked_whiten returned.
template <class Backend>
Tensor masked_whiten_backward(Tensor grad, Tensor values, Tensor weights, Tensor moments, int64_t mode, bool unbiased,
                              double eps) {
  const WhitenOptions options = whiten_options(mode, unbiased, eps);
  check_weighted("masked_whiten", values, weights);
  require_token_tensors_like("masked_whiten", values, {{"grad", grad}});
  require_entries("masked_whiten", "moments", moments, kSavedMoments, values, values.scalar_type());
  Tensor out = new_dense_like(values);
  dispatch_floats(values.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    Backend::whiten_backward(weighted_entries<A>(values, weights), pointer<A>(grad), pointer<A>(moments), options,
                             pointer<A>(out), values);
  });
  return out;
}

}  // namespace ppo_ext
