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
  const Tensor &max, &sum, &ref_at_max, &mean_gap;

  template <class A>
  KLRowStats<A> pointers() const {
    KLRowStats<A> stats;
    stats.max = pointer<A>(max);
    stats.sum = pointer<A>(sum);
    stats.ref_at_max = pointer<A>(ref_at_max);
    stats.mean_gap = pointer<A>(mean_gap);
    return stats;
  }
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> full_kl(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask,
                                                           std::optional<Tensor> temperatures, double temperature) {
  check_full_kl(logits, ref_logits, mask, temperatures, temperature);
  Tensor kl = new_row_tensor(logits), max = new_row_tensor(logits), sum = new_row_tensor(logits),
         ref_at_max = new_row_tensor(logits), mean_gap = new_row_tensor(logits);
  const KLRowStatTensors stats{max, sum, ref_at_max, mean_gap};
  dispatch_logits(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    Backend::forward(kl_inputs<T, A>(logits, ref_logits, mask, temperatures, temperature), pointer<A>(kl),
                     stats.pointers<A>(), logits);
  });
  return {kl, max, sum, ref_at_max, mean_gap};
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
                       {"row_max", saved.max},
                       {"row_sum", saved.sum},
                       {"ref_at_max", saved.ref_at_max},
                       {"mean_gap", saved.mean_gap}});
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
Tensor full_kl_backward(Tensor logits, Tensor ref_logits, Tensor grad_kl, std::optional<Tensor> mask, Tensor max,
                        Tensor sum, Tensor ref_at_max, Tensor mean_gap, std::optional<Tensor> temperatures,
                        double temperature) {
  Tensor grad = new_dense_like(logits);
  run_full_kl_backward<Backend>(logits, ref_logits, grad_kl, mask, {max, sum, ref_at_max, mean_gap}, temperatures,
                                temperature, grad);
  return grad;
}

template <class Backend>
void full_kl_backward_inplace(Tensor logits, Tensor ref_logits, Tensor grad_kl, std::optional<Tensor> mask, Tensor max,
                              Tensor sum, Tensor ref_at_max, Tensor mean_gap, std::optional<Tensor> temperatures,
                              double temperature) {
  require_no_overlap("full_kl", "logits", logits);
  run_full_kl_backward<Backend>(logits, ref_logits, grad_kl, mask, {max, sum, ref_at_max, mean_gap}, temperatures,
                                temperature, logits);
}

}  // namespace ppo_ext
