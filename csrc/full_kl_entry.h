// full_kl_entry.h: the operators _full_kl, _full_kl_backward and _full_kl_backward_ without their loops: they check the
//                  arguments, make the results, and give `Backend` (full_kl_cpu.cpp, full_kl_cuda.cu) a job.
#pragma once

#include <tuple>

#include "common/checks.h"
#include "full_kl.h"

namespace ppo_ext {

inline void check_full_kl(const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask,
                          const std::optional<Tensor>& temperatures, double temperature) {
  require_logits("full_kl", logits);
  require_positive("full_kl", "temperature", temperature);
  require_temperatures("full_kl", logits, temperatures);
  require_same_device("full_kl", "ref_logits", ref_logits, logits);
  require_dtype("full_kl", "ref_logits", ref_logits, logits.scalar_type());
  require_shape("full_kl", "ref_logits", ref_logits, logits, logits.dim());
  require_mask("full_kl", mask, logits, logits.dim() - 1);
}

template <class T, class A>
KLInputs<T, A> kl_inputs(const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask,
                         const std::optional<Tensor>& temperatures, double temperature) {
  KLInputs<T, A> in;
  in.logits = pointer<T>(logits);
  in.ref_logits = pointer<T>(ref_logits);
  in.rows = logit_rows("full_kl", "logits", logits);
  in.ref_rows = logit_rows("full_kl", "ref_logits", ref_logits);
  in.mask = pointer<bool>(mask);
  in.inv_temperature = {A(1.0 / temperature), pointer<A>(temperatures)};
  return in;
}

// One tensor for each member of KLRowStats.
struct KLRowStatTensors {
  const Tensor &kl, &max, &log_sum, &ref_max, &ref_log_sum;

  template <class A>
  KLRowStats<A> pointers() const {
    KLRowStats<A> stats;
    stats.kl = pointer<A>(kl);
    stats.max = pointer<A>(max);
    stats.log_sum = pointer<A>(log_sum);
    stats.ref_max = pointer<A>(ref_max);
    stats.ref_log_sum = pointer<A>(ref_log_sum);
    return stats;
  }
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> full_kl(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask,
                                                           std::optional<Tensor> temperatures, double temperature) {
  check_full_kl(logits, ref_logits, mask, temperatures, temperature);
  Tensor kl = new_row_tensor(logits), max = new_row_tensor(logits), log_sum = new_row_tensor(logits),
         ref_max = new_row_tensor(logits), ref_log_sum = new_row_tensor(logits);
  const KLRowStatTensors stats{kl, max, log_sum, ref_max, ref_log_sum};
  dispatch_logits(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    Backend::forward(kl_inputs<T, A>(logits, ref_logits, mask, temperatures, temperature), stats.pointers<A>(), logits);
  });
  return {kl, max, log_sum, ref_max, ref_log_sum};
}

// ---- backward ----

// Writes the gradient to `grad`, which may be the logits.
template <class Backend>
void run_full_kl_backward(const Tensor& logits, const Tensor& ref_logits, const Tensor& grad_kl,
                          const std::optional<Tensor>& mask, const KLRowStatTensors& saved,
                          const std::optional<Tensor>& temperatures, double temperature, const Tensor& grad) {
  check_full_kl(logits, ref_logits, mask, temperatures, temperature);
  require_row_tensors("full_kl", logits,
                      {{"grad_kl", grad_kl},
                       {"kl", saved.kl},
                       {"row_max", saved.max},
                       {"log_sum", saved.log_sum},
                       {"ref_row_max", saved.ref_max},
                       {"ref_log_sum", saved.ref_log_sum}});
  dispatch_logits(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    KLGradient<T, A> out;
    out.grad_kl = pointer<A>(grad_kl);
    out.grad = pointer<T>(grad);
    out.rows = logit_rows("full_kl", "grad", grad);
    Backend::backward(kl_inputs<T, A>(logits, ref_logits, mask, temperatures, temperature), saved.pointers<A>(), out,
                      grad);
  });
}

template <class Backend>
Tensor full_kl_backward(Tensor logits, Tensor ref_logits, Tensor grad_kl, std::optional<Tensor> mask, Tensor kl,
                        Tensor max, Tensor log_sum, Tensor ref_max, Tensor ref_log_sum,
                        std::optional<Tensor> temperatures, double temperature) {
  Tensor grad = new_dense_like(logits);
  run_full_kl_backward<Backend>(logits, ref_logits, grad_kl, mask, {kl, max, log_sum, ref_max, ref_log_sum},
                                temperatures, temperature, grad);
  return grad;
}

template <class Backend>
void full_kl_backward_inplace(Tensor logits, Tensor ref_logits, Tensor grad_kl, std::optional<Tensor> mask, Tensor kl,
                              Tensor max, Tensor log_sum, Tensor ref_max, Tensor ref_log_sum,
                              std::optional<Tensor> temperatures, double temperature) {
  require_no_overlap("full_kl", "logits", logits);
  run_full_kl_backward<Backend>(logits, ref_logits, grad_kl, mask, {kl, max, log_sum, ref_max, ref_log_sum},
                                temperatures, temperature, logits);
}

}  // namespace ppo_ext
