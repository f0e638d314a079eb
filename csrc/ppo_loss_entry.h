// ppo_loss_entry.h: the operators _ppo_loss and _ppo_loss_backward without their loops: they check the arguments, make
//                   the results, and give `Backend` (ppo_loss_cpu.cpp, ppo_loss_cuda.cu) a job.
#pragma once

#include <tuple>

#include "common/checks.h"
#include "ppo_loss.h"

namespace ppo_ext {

// ratio_threshold may be any number; Python refuses a NaN.
inline void check_ppo_coefficients(const PPOCoefficients& coefficients) {
  const auto require_not_negative = [](const char* argument, double x) {
    if (!(x >= 0)) reject("ppo_loss", argument, "not be negative", x);
  };
  require_not_negative("cliprange", coefficients.cliprange);
  require_not_negative("cliprange_value", coefficients.cliprange_value);
  require_finite("ppo_loss", "vf_coef", coefficients.vf_coef);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss(const Tensor& logprobs, const Tensor& old_logprobs,
                                                                    const Tensor& advantages, const Tensor& vpreds,
                                                                    const Tensor& values, const Tensor& returns,
                                                                    const Tensor& mask, double cliprange,
                                                                    double cliprange_value, double vf_coef,
                                                                    double ratio_threshold) {
  PPOCoefficients coefficients;
  coefficients.cliprange = cliprange;
  coefficients.cliprange_value = cliprange_value;
  coefficients.vf_coef = vf_coef;
  coefficients.ratio_threshold = ratio_threshold;
  check_ppo_coefficients(coefficients);
  require_float_or_double("ppo_loss", "logprobs", logprobs);
  require_token_tensors_like("ppo_loss", logprobs,
                             {{"logprobs", logprobs},
                              {"old_logprobs", old_logprobs},
                              {"advantages", advantages},
                              {"vpreds", vpreds},
                              {"values", values},
                              {"returns", returns}});
  require_mask("ppo_loss", mask, logprobs, logprobs.dim());
  const ScalarType dtype = logprobs.scalar_type();
  Tensor loss = new_tensor(logprobs, {}, dtype), stats = new_tensor(logprobs, {kPPOStats}, dtype);
  Tensor ratio = new_dense_like(logprobs), counted_advantages = new_dense_like(logprobs);
  Tensor grad_logprobs = new_dense_like(logprobs), grad_vpreds = new_dense_like(logprobs);
  dispatch_floats(dtype, [&](auto zero) {
    using A = decltype(zero);
    PPOJob<A> job{};
    job.logprobs = pointer<A>(logprobs);
    job.old_logprobs = pointer<A>(old_logprobs);
    job.advantages = pointer<A>(advantages);
    job.vpreds = pointer<A>(vpreds);
    job.values = pointer<A>(values);
    job.returns = pointer<A>(returns);
    job.mask = pointer<bool>(mask);
    job.ratio = pointer<A>(ratio);
    job.counted_advantages = pointer<A>(counted_advantages);
    job.grad_logprobs = pointer<A>(grad_logprobs);
    job.grad_vpreds = pointer<A>(grad_vpreds);
    job.stats = pointer<A>(stats);
    job.loss = pointer<A>(loss);
    job.tokens = logprobs.numel();
    job.coefficients = coefficients;
    Backend::forward(job, logprobs);
  });
  return {loss, stats, ratio, counted_advantages, grad_logprobs, grad_vpreds};
}

template <class Backend>
std::tuple<Tensor, Tensor> ppo_loss_backward(const Tensor& grad_loss, const Tensor& stats, const Tensor& grad_logprobs,
                                             const Tensor& grad_vpreds) {
  require_float_or_double("ppo_loss", "grad_logprobs", grad_logprobs);
  require_token_tensors_like("ppo_loss", grad_logprobs,
                             {{"grad_logprobs", grad_logprobs}, {"grad_vpreds", grad_vpreds}});
  const ScalarType dtype = grad_logprobs.scalar_type();
  require_entries("ppo_loss", "grad_loss", grad_loss, 1, grad_logprobs, dtype);
  require_entries("ppo_loss", "stats", stats, kPPOStats, grad_logprobs, dtype);
  Tensor out_logprobs = new_dense_like(grad_logprobs), out_vpreds = new_dense_like(grad_logprobs);
  dispatch_floats(dtype, [&](auto zero) {
    using A = decltype(zero);
    PPOBackwardJob<A> job{};
    job.grad_loss = pointer<A>(grad_loss);
    job.stats = pointer<A>(stats);
    job.grad_logprobs = pointer<A>(grad_logprobs);
    job.grad_vpreds = pointer<A>(grad_vpreds);
    job.out_logprobs = pointer<A>(out_logprobs);
    job.out_vpreds = pointer<A>(out_vpreds);
    job.tokens = grad_logprobs.numel();
    Backend::backward(job, grad_logprobs);
  });
  return {out_logprobs, out_vpreds};
}

}  // namespace ppo_ext
