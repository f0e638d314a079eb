// ppo_loss_cpu.cpp
// Computes  see ppo_loss.h
// Bytes     41 per token in fp32: six inputs, the mask, the ratio, the counted advantages and two gradients
// Launch    threads over blocks of 8192 tokens
// Sums      fp64, over blocks in their order: same bits for any threads
// Limits    none

#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "ppo_loss_simd.h"

namespace ppo_ext {
namespace {

constexpr int64_t kBlock = 8192;

template <class A>
PPOSums sum_all(const PPOJob<A>& job, int64_t tokens) {
  const int64_t blocks = (tokens + kBlock - 1) / kBlock;
  std::vector<PPOSums> parts(blocks, PPOSums{});
  parallel_rows(blocks, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      parts[b] = PPO_AT_LEVEL(fill_block, job, b * kBlock, std::min((b + 1) * kBlock, tokens));
  });
  PPOSums sums{};
  for (const PPOSums& part : parts) sums = ppo_merge(sums, part);
  return sums;
}

// ---- entry points ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss_cpu(Tensor logprobs, Tensor old_logprobs,
                                                                        Tensor advantages, Tensor vpreds, Tensor values,
                                                                        Tensor returns, Tensor mask, double cliprange,
                                                                        double cliprange_value, double vf_coef,
                                                                        double ratio_threshold) {
  check_ppo_coefficients(cliprange, cliprange_value, vf_coef);
  check_ppo_loss(logprobs, {&old_logprobs, &advantages, &vpreds, &values, &returns}, mask);
  const ScalarType dtype = logprobs.scalar_type();
  Tensor loss = new_tensor(logprobs, {}, dtype), stats = new_tensor(logprobs, {kPPOStats}, dtype);
  const auto like = [&] { return new_token_tensor(logprobs, logprobs.dim(), dtype); };
  Tensor ratio = like(), counted_advantages = like(), grad_logprobs = like(), grad_vpreds = like();
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const PPOJob<A> job{pointer<A>(logprobs),
                        pointer<A>(old_logprobs),
                        pointer<A>(advantages),
                        pointer<A>(vpreds),
                        pointer<A>(values),
                        pointer<A>(returns),
                        pointer<bool>(mask),
                        pointer<A>(ratio),
                        pointer<A>(counted_advantages),
                        pointer<A>(grad_logprobs),
                        pointer<A>(grad_vpreds),
                        A(cliprange),
                        A(cliprange_value),
                        A(vf_coef)};
    ppo_write_stats(sum_all(job, logprobs.numel()), vf_coef, ratio_threshold, pointer<A>(stats), pointer<A>(loss));
  };
  dtype == ScalarType::Double ? run(0.0) : run(0.0f);
  return {loss, stats, ratio, counted_advantages, grad_logprobs, grad_vpreds};
}

template <class A>
void scale_gradients(const Tensor& grad_loss, const Tensor& stats, const Tensor& grad_logprobs,
                     const Tensor& grad_vpreds, const Tensor& out_logprobs, const Tensor& out_vpreds) {
  const A grad_scale = pointer<A>(stats)[kGradScale], scale = *pointer<A>(grad_loss) * grad_scale;
  const A *a = pointer<A>(grad_logprobs), *b = pointer<A>(grad_vpreds);
  A *x = pointer<A>(out_logprobs), *y = pointer<A>(out_vpreds);
  parallel_rows(grad_logprobs.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      x[i] = scaled_gradient(a[i], scale, grad_scale);
      y[i] = scaled_gradient(b[i], scale, grad_scale);
    }
  });
}

std::tuple<Tensor, Tensor> ppo_loss_backward_cpu(Tensor grad_loss, Tensor stats, Tensor grad_logprobs,
                                                 Tensor grad_vpreds) {
  check_ppo_loss_backward(grad_loss, stats, grad_logprobs, grad_vpreds, kPPOStats);
  Tensor out_logprobs = new_token_tensor(grad_logprobs, grad_logprobs.dim(), grad_logprobs.scalar_type());
  Tensor out_vpreds = new_token_tensor(grad_vpreds, grad_vpreds.dim(), grad_vpreds.scalar_type());
  const auto f = grad_logprobs.scalar_type() == ScalarType::Double ? scale_gradients<double> : scale_gradients<float>;
  f(grad_loss, stats, grad_logprobs, grad_vpreds, out_logprobs, out_vpreds);
  return {out_logprobs, out_vpreds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_ppo_loss", TORCH_BOX(&ppo_loss_cpu));
  m.impl("_ppo_loss_backward", TORCH_BOX(&ppo_loss_backward_cpu));
}

}  // namespace ppo_ext
