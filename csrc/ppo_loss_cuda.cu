// ppo_loss_cuda.cu
// Computes  see ppo_loss.h
// Bytes     41 per token in fp32: six inputs, the mask, the ratio, the counted advantages and two gradients; backward 16
// Launch    blocks of 512 threads, 4 tokens a thread; one kernel up to 2048 tokens, beyond that a second one that merges
// Sums      in fp64, variances by Chan's merge, in an order that depends on the number of tokens only
// Limits    none

#include "common/launch.h"
#include "common/reduce.cuh"
#include "ppo_loss.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 512;
constexpr int64_t kTokensPerPart = 2048;
constexpr int64_t kMaxParts = kBlock;  // so that one block merges them, one each thread

template <class A>
struct Job {
  const A *logprobs, *old_logprobs, *advantages, *vpreds, *values, *returns;
  const bool* mask;
  A *ratio, *counted_advantages, *grad_logprobs, *grad_vpreds;
  int64_t tokens;
  A cliprange, cliprange_value;
  double vf_coef, ratio_threshold;
  A *stats, *loss;
};

// ---- device helpers ----

template <class A>
__device__ __forceinline__ PPOSums sums_of_token(const PPOToken<A>& x, const PPOTerms<A>& terms) {
  const double d = double(x.logprob) - double(x.old_logprob), error = double(x.vpred) - double(x.ret);
  return {terms.pg,         terms.vf,         0.5 * d * d,       -d,
          terms.pg_clipped, x.advantage,      terms.ratio,       x.vpred,
          error * error,    terms.vf_clipped, {1.0, x.ret, 0.0}, {1.0, x.value, 0.0}};
}

// Fills the per-token results of one token and gives its terms of the sums.
template <class A>
__device__ __forceinline__ PPOSums fill_token(const Job<A>& job, int64_t i) {
  if (!job.mask[i]) {
    job.ratio[i] = job.counted_advantages[i] = job.grad_logprobs[i] = job.grad_vpreds[i] = A(0);
    return {};
  }
  const PPOToken<A> x{job.logprobs[i], job.old_logprobs[i], job.advantages[i],
                      job.vpreds[i],   job.values[i],       job.returns[i]};
  const PPOTerms<A> terms = ppo_terms(x, token_ratio(x.logprob, x.old_logprob), job.cliprange, job.cliprange_value);
  job.ratio[i] = terms.ratio;
  job.counted_advantages[i] = x.advantage;
  job.grad_logprobs[i] = terms.grad_logprob;
  job.grad_vpreds[i] = A(job.vf_coef) * terms.grad_vpred;
  return sums_of_token(x, terms);
}

__device__ __forceinline__ PPOSums merge_block(const PPOSums& sums) {
  return reduce_group<kBlock>(sums, [](const PPOSums& a, const PPOSums& b) { return ppo_merge(a, b); });
}

// ---- kernels ----

template <class A>
__global__ void __launch_bounds__(kBlock) ppo_loss_kernel(const Job<A> job, PPOSums* parts) {
  PPOSums sums{};
  for (int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x; i < job.tokens; i += int64_t(gridDim.x) * kBlock)
    sums = ppo_merge(sums, fill_token(job, i));
  sums = merge_block(sums);
  if (threadIdx.x != 0) return;
  if (parts) {
    parts[blockIdx.x] = sums;
  } else {
    ppo_write_stats(sums, job.vf_coef, job.ratio_threshold, job.stats, job.loss);
  }
}

template <class A>
__global__ void __launch_bounds__(kBlock) finish_kernel(const Job<A> job, const PPOSums* parts, int count) {
  const PPOSums sums = merge_block(int(threadIdx.x) < count ? parts[threadIdx.x] : PPOSums{});
  if (threadIdx.x == 0) ppo_write_stats(sums, job.vf_coef, job.ratio_threshold, job.stats, job.loss);
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    backward_kernel(const A* grad_loss, const A* stats, const A* grad_logprobs, const A* grad_vpreds, int64_t tokens,
                    A* out_logprobs, A* out_vpreds) {
  const A grad_scale = stats[kGradScale], scale = *grad_loss * grad_scale;
  for (int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x; i < tokens; i += int64_t(gridDim.x) * kBlock) {
    out_logprobs[i] = scaled_gradient(grad_logprobs[i], scale, grad_scale);
    out_vpreds[i] = scaled_gradient(grad_vpreds[i], scale, grad_scale);
  }
}

// ---- entry points ----

template <class A>
void launch_forward(const Launcher& launch, const Job<A>& job, const Tensor& scratch, int64_t parts) {
  if (parts == 1) {
    launch(ppo_loss_kernel<A>, 1, kBlock, job, nullptr);
  } else {
    PPOSums* const partial = static_cast<PPOSums*>(scratch.data_ptr());
    launch(ppo_loss_kernel<A>, parts, kBlock, job, partial);
    launch(finish_kernel<A>, 1, kBlock, job, partial, int(parts));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss_cuda(Tensor logprobs, Tensor old_logprobs,
                                                                         Tensor advantages, Tensor vpreds,
                                                                         Tensor values, Tensor returns, Tensor mask,
                                                                         double cliprange, double cliprange_value,
                                                                         double vf_coef, double ratio_threshold) {
  check_ppo_coefficients(cliprange, cliprange_value, vf_coef);
  check_ppo_loss(logprobs, {&old_logprobs, &advantages, &vpreds, &values, &returns}, mask);
  const Launcher launch("ppo_loss", logprobs);
  const ScalarType dtype = logprobs.scalar_type();
  const int64_t n = logprobs.numel(), parts = std::max<int64_t>(1, std::min(kMaxParts, divide_up(n, kTokensPerPart)));
  Tensor loss = new_tensor(logprobs, {}, dtype), stats = new_tensor(logprobs, {kPPOStats}, dtype);
  const auto like = [&] { return new_token_tensor(logprobs, logprobs.dim(), dtype); };
  Tensor ratio = like(), counted_advantages = like(), grad_logprobs = like(), grad_vpreds = like();
  const Tensor scratch =
      new_tensor(logprobs, {parts > 1 ? parts * int64_t(sizeof(PPOSums) / sizeof(double)) : 0}, ScalarType::Double);
  dispatch_floats(dtype, [&](auto zero) {
    using A = decltype(zero);
    const Job<A> job{pointer<A>(logprobs),
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
                     n,
                     A(cliprange),
                     A(cliprange_value),
                     vf_coef,
                     ratio_threshold,
                     pointer<A>(stats),
                     pointer<A>(loss)};
    launch_forward(launch, job, scratch, parts);
  });
  return {loss, stats, ratio, counted_advantages, grad_logprobs, grad_vpreds};
}

std::tuple<Tensor, Tensor> ppo_loss_backward_cuda(Tensor grad_loss, Tensor stats, Tensor grad_logprobs,
                                                  Tensor grad_vpreds) {
  check_ppo_loss_backward(grad_loss, stats, grad_logprobs, grad_vpreds, kPPOStats);
  const Launcher launch("ppo_loss", grad_logprobs);
  const auto like = [&](const Tensor& x) { return new_token_tensor(x, x.dim(), x.scalar_type()); };
  Tensor out_logprobs = like(grad_logprobs), out_vpreds = like(grad_vpreds);
  const int64_t n = grad_logprobs.numel();
  dispatch_floats(grad_logprobs.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    launch(backward_kernel<A>, divide_up(n, kBlock), kBlock, pointer<A>(grad_loss), pointer<A>(stats),
           pointer<A>(grad_logprobs), pointer<A>(grad_vpreds), n, pointer<A>(out_logprobs), pointer<A>(out_vpreds));
  });
  return {out_logprobs, out_vpreds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) {
  m.impl("_ppo_loss", TORCH_BOX(&ppo_loss_cuda));
  m.impl("_ppo_loss_backward", TORCH_BOX(&ppo_loss_backward_cuda));
}

}  // namespace ppo_ext
