// gae_entry.h: the operator _gae without its loops: it checks the arguments, makes the results, and gives `Backend`
//              (gae_cpu.cpp, gae_cuda.cu) a job.
#pragma once

#include <tuple>

#include "common/checks.h"
#include "gae.h"

namespace ppo_ext {

inline void check_gae(const Tensor& values, const Tensor& rewards, const std::optional<Tensor>& mask, double gamma,
                      double lam) {
  require_finite("gae", "gamma", gamma);
  require_finite("gae", "lam", lam);
  require_float_or_double("gae", "values", values);
  require_matrix("gae", "values", values, "[B, T]");
  require_token_tensors_like("gae", values, {{"values", values}, {"rewards", rewards}});
  require_mask("gae", mask, values, 2);
}

template <class Backend>
std::tuple<Tensor, Tensor> gae(Tensor values, Tensor rewards, std::optional<Tensor> mask, double gamma, double lam) {
  check_gae(values, rewards, mask, gamma, lam);
  Tensor advantages = new_dense_like(values), returns = new_dense_like(values);
  dispatch_floats(values.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    GAEJob<A> job{};
    job.values = pointer<A>(values);
    job.rewards = pointer<A>(rewards);
    job.mask = pointer<bool>(mask);
    job.advantages = pointer<A>(advantages);
    job.returns = pointer<A>(returns);
    job.B = values.size(0);
    job.T = values.size(1);
    job.gamma = A(gamma);
    job.gamma_lam = A(gamma * lam);
    Backend::run(job, values);
  });
  return {advantages, returns};
}

}  // namespace ppo_ext
