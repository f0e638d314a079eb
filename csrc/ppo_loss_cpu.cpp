// ppo_loss_cpu.cpp
// Computes  see ppo_loss.h
// Bytes     41 per token in fp32: six inputs, the mask, the ratio, the counted advantages and two gradients
// Launch    threads over blocks of 8192 tokens
// Sums      fp64, over blocks in their order: same bits for any threads
// Limits    none

#include <vector>

#include "common/parallel.h"
#include "ppo_loss_entry.h"
#include "ppo_loss_simd.h"

namespace ppo_ext {
namespace {

constexpr int64_t kBlock = 8192;

// The factors come by value: the compiler does not vectorize the loop unless it sees that the results do not overwrite
// them.
template <class A>
void scale_gradients(const PPOBackwardJob<A>& job, A scale, A grad_scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    job.out_logprobs[i] = scaled_gradient(job.grad_logprobs[i], scale, grad_scale);
    job.out_vpreds[i] = scaled_gradient(job.grad_vpreds[i], scale, grad_scale);
  }
}

struct OnCPU {
  template <class A>
  static void forward(const PPOJob<A>& job, const Tensor&) {
    const int64_t blocks = (job.tokens + kBlock - 1) / kBlock;
    std::vector<PPOSums> parts(blocks, PPOSums{});
    parallel_rows(blocks, kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        parts[b] = PPO_AT_LEVEL(fill_block, job, b * kBlock, std::min((b + 1) * kBlock, job.tokens));
    });
    PPOSums sums{};
    for (const PPOSums& part : parts) sums = ppo_merge(sums, part);
    ppo_write_stats(sums, job);
  }

  template <class A>
  static void backward(const PPOBackwardJob<A>& job, const Tensor&) {
    const A grad_scale = job.stats[kGradScale], scale = *job.grad_loss * grad_scale;
    parallel_rows(job.tokens, 1,
                  [&](int64_t begin, int64_t end) { scale_gradients(job, scale, grad_scale, begin, end); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_ppo_loss", TORCH_BOX(&ppo_loss<OnCPU>));
  m.impl("_ppo_loss_backward", TORCH_BOX(&ppo_loss_backward<OnCPU>));
}

}  // namespace ppo_ext
