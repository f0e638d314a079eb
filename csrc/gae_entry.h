// gae_entry.h: the operator _gae without its loops: it checks the arguments, makes the results, and gives `Backend`
//              (gae_cpu.cpp, gae_cuda.cu) a job.
#pragma once

#include <algorithm>
#include <tuple>
#include <utility>

#include "common/checks.h"
#include "gae.h"

namespace ppo_ext {

// The arguments of the operator. gamma_lams: gamma times each sequence's lambda. lam_returns: read if decoupled.
struct GAEArguments {
  const Tensor &values, &rewards;
  const std::optional<Tensor>&mask, &bootstrap, &gamma_lams, &cu_seqlens;
  double gamma, lam, lam_returns;
  bool decoupled;

  int64_t sequences() const { return cu_seqlens ? cu_seqlens->numel() - 1 : values.size(0); }
};

inline void check_gae(const GAEArguments& in) {
  require_finite("gae", "gamma", in.gamma);
  require_finite("gae", "lam", in.lam);
  require_finite("gae", "lam_returns", in.lam_returns);
  const Tensor& values = in.values;
  require_float_or_double("gae", "values", values);
  if (in.cu_seqlens) {
    if (values.dim() != 1) reject("gae", "values", "have the shape [N]", shape_text(values));
    const int64_t bounds = in.cu_seqlens->numel();
    require_entries("gae", "cu_seqlens", *in.cu_seqlens, std::max<int64_t>(bounds, 1), values, ScalarType::Long);
  } else {
    require_matrix("gae", "values", values, "[B, T]");
  }
  require_token_tensors_like("gae", values, {{"values", values}, {"rewards", in.rewards}});
  require_mask("gae", in.mask, values, int(values.dim()));
  for (const auto& [name, x] : {std::pair("bootstrap", &in.bootstrap), std::pair("gamma_lams", &in.gamma_lams)})
    if (*x) require_entries("gae", name, **x, in.sequences(), values, values.scalar_type());
}

template <class A>
GAEJob<A> gae_job(const GAEArguments& in) {
  GAEJob<A> job{};
  job.values = pointer<A>(in.values);
  job.rewards = pointer<A>(in.rewards);
  job.mask = pointer<bool>(in.mask);
  job.bootstrap = pointer<A>(in.bootstrap);
  job.gamma_lams = pointer<A>(in.gamma_lams);
  job.offsets = pointer<int64_t>(in.cu_seqlens);
  job.B = in.sequences();
  job.tokens = in.values.numel();
  // of packed sequences the mean, which decides on the sizes of groups of threads alone
  job.T = in.cu_seqlens ? (job.B ? job.tokens / job.B : 0) : in.values.size(1);
  job.gamma = A(in.gamma);
  job.gamma_lam = A(in.gamma * in.lam);
  job.gamma_lam_returns = A(in.gamma * in.lam_returns);
  job.decoupled = in.decoupled;
  return job;
}

template <class Backend>
std::tuple<Tensor, Tensor> gae(Tensor values, Tensor rewards, std::optional<Tensor> mask,
                               std::optional<Tensor> bootstrap, std::optional<Tensor> gamma_lams,
                               std::optional<Tensor> cu_seqlens, double gamma, double lam, double lam_returns,
                               bool decoupled) {
  const GAEArguments in{values, rewards, mask, bootstrap, gamma_lams, cu_seqlens, gamma, lam, lam_returns, decoupled};
  check_gae(in);
  Tensor advantages = new_dense_like(values), returns = new_dense_like(values);
  dispatch_floats(values.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    GAEJob<A> job = gae_job<A>(in);
    job.advantages = pointer<A>(advantages);
    job.returns = pointer<A>(returns);
    Backend::run(job, values);
  });
  return {advantages, returns};
}

}  // namespace ppo_ext
