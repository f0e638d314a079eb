// logprobs_entry.h: the operators _logprobs, _logprobs_backward and _logprobs_backward_ without their loops: they check
//                   the arguments, make the results, and give `Backend` (logprobs_cpu.cpp, logprobs_cuda.cu) a job.
//                   Labels outside [0, V) are left to it: on the CPU they are an error, on CUDA they give NaN.
#pragma once

#include <tuple>

#include "common/checks.h"
#include "logprobs.h"

namespace ppo_ext {

inline void check_logprobs(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& mask,
                           const std::optional<Tensor>& temperatures, double temperature) {
  require_logits("logprobs", logits);
  require_positive("logprobs", "temperature", temperature);
  require_temperatures("logprobs", logits, temperatures);
  const int64_t dims = logits.dim() - 1;
  require_token_tensor("logprobs", "labels", labels, logits, dims, ScalarType::Long);
  require_mask("logprobs", mask, logits, dims);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> logprobs(Tensor logits, Tensor labels, std::optional<Tensor> mask,
                                                    std::optional<Tensor> temperatures, double temperature,
                                                    bool with_entropy, std::optional<Tensor> label_note) {
  check_logprobs(logits, labels, mask, temperatures, temperature);
  if (label_note) require_entries("logprobs", "label_note", *label_note, 4, logits, ScalarType::Long);
  Tensor logprobs = new_row_tensor(logits), max = new_row_tensor(logits), log_sum = new_row_tensor(logits);
  Tensor entropy = with_entropy ? new_row_tensor(logits) : new_tensor(logits, {0}, logprobs.scalar_type());
  dispatch_logits(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    LogprobsJob<T, A> job{};
    job.logits = pointer<T>(logits);
    job.rows = logit_rows("logprobs", "logits", logits);
    job.labels = pointer<int64_t>(labels);
    job.mask = pointer<bool>(mask);
    job.inv_temperature = {A(1.0 / temperature), pointer<A>(temperatures)};
    job.logprobs = pointer<A>(logprobs);
    job.entropy = with_entropy ? pointer<A>(entropy) : nullptr;
    job.max = pointer<A>(max);
    job.log_sum = pointer<A>(log_sum);
    job.label_note = pointer<int64_t>(label_note);
    Backend::forward(job, labels);
  });
  return {logprobs, entropy, max, log_sum};
}

// ---- backward ----

// The arguments of the backward pass but for the logits. Of the gradients either may be missing.
struct LogprobsBackwardArguments {
  const std::optional<Tensor>&grad_logprobs, &grad_entropy;
  const Tensor& labels;
  const std::optional<Tensor>& mask;
  const Tensor &entropy, &max, &log_sum;
  const std::optional<Tensor>& temperatures;
  double temperature;
};

// Writes the gradient to `grad`, which may be the logits.
template <class Backend>
void run_logprobs_backward(const Tensor& logits, const Tensor& grad, const LogprobsBackwardArguments& in) {
  check_logprobs(logits, in.labels, in.mask, in.temperatures, in.temperature);
  require_row_tensors("logprobs", logits, {{"row_max", in.max}, {"log_sum", in.log_sum}});
  if (in.grad_logprobs) require_row_tensors("logprobs", logits, {{"grad_logprobs", *in.grad_logprobs}});
  if (in.grad_entropy)
    require_row_tensors("logprobs", logits, {{"grad_entropy", *in.grad_entropy}, {"entropy", in.entropy}});
  dispatch_logits(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    LogprobsBackwardJob<T, A> job{};
    job.logits = pointer<T>(logits);
    job.rows = logit_rows("logprobs", "logits", logits);
    job.grad = pointer<T>(grad);
    job.grad_rows = logit_rows("logprobs", "grad", grad);
    job.labels = pointer<int64_t>(in.labels);
    job.mask = pointer<bool>(in.mask);
    job.grad_logprobs = pointer<A>(in.grad_logprobs);
    job.grad_entropy = pointer<A>(in.grad_entropy);
    job.entropy = in.grad_entropy ? pointer<A>(in.entropy) : nullptr;
    job.max = pointer<A>(in.max);
    job.log_sum = pointer<A>(in.log_sum);
    job.inv_temperature = {A(1.0 / in.temperature), pointer<A>(in.temperatures)};
    Backend::backward(job, in.labels, grad);
  });
}

template <class Backend>
Tensor logprobs_backward(Tensor logits, std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy,
                         Tensor labels, std::optional<Tensor> mask, Tensor entropy, Tensor max, Tensor log_sum,
                         std::optional<Tensor> temperatures, double temperature) {
  Tensor grad = new_dense_like(logits);
  run_logprobs_backward<Backend>(
      logits, grad, {grad_logprobs, grad_entropy, labels, mask, entropy, max, log_sum, temperatures, temperature});
  return grad;
}

template <class Backend>
void logprobs_backward_inplace(Tensor logits, std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy,
                               Tensor labels, std::optional<Tensor> mask, Tensor entropy, Tensor max, Tensor log_sum,
                               std::optional<Tensor> temperatures, double temperature) {
  require_no_overlap("logprobs", "logits", logits);
  run_logprobs_backward<Backend>(
      logits, logits, {grad_logprobs, grad_entropy, labels, mask, entropy, max, log_sum, temperatures, temperature});
}

}  // namespace ppo_ext
