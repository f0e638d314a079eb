// ppo_loss_options_cpu.cpp
// Computes  see ppo_loss_options.h
// Bytes     41 per token in fp32 as without options, and 4 for each further tensor and its gradient
// Launch    threads over groups of rows of about 8192 tokens; where rows do not matter, over blocks of 8192 tokens
// Sums      fp64, over groups in their order: same bits for any threads
// Limits    none

#include <vector>

#include "common/parallel.h"
#include "ppo_loss_options_entry.h"
#include "ppo_loss_options_simd.h"

namespace ppo_ext {
namespace {

constexpr int64_t kBlock = 8192;

template <class A>
void scale_gradient(const A* grads, A* out, A scale, A grad_scale, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) out[i] = scaled_gradient(grads[i], scale, grad_scale);
}

struct OptionsOnCPU {
  template <class A>
  static void forward(const PPOOptionsJob<A>& job, const Tensor&) {
    const int64_t length = job.options.by_row() ? job.row_length : kBlock;
    const int64_t rows = length == 0 ? 0 : (job.tokens + length - 1) / length;
    const int64_t group = std::max<int64_t>(1, kBlock / std::max<int64_t>(length, 1));
    std::vector<PPOOptionSums> parts((rows + group - 1) / group);
    parallel_rows(int64_t(parts.size()), std::max(kBlock, length), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        parts[p] = PPO_AT_LEVEL(fill_rows, job, p * group, std::min((p + 1) * group, rows), length);
    });
    PPOOptionSums sums = ppo_no_option_sums();
    for (const PPOOptionSums& part : parts) sums = ppo_option_merge(sums, part);
    ppo_write_option_stats(sums, job);
  }

  template <class A>
  static void backward(const PPOOptionsBackwardJob<A>& job, const Tensor&) {
    const A grad_scale = job.stats[kGradScale], scale = *job.grad_loss * grad_scale;
    parallel_rows(job.tokens, 1, [&](int64_t begin, int64_t end) {
      for (int k = 0; k < kPPOGradients; ++k)
        if (job.grads[k]) scale_gradient(job.grads[k], job.out[k], scale, grad_scale, begin, end);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_ppo_loss_options", TORCH_BOX(&ppo_loss_options<OptionsOnCPU>));
  m.impl("_ppo_loss_options_backward", TORCH_BOX(&ppo_loss_options_backward<OptionsOnCPU>));
}

}  // namespace ppo_ext
