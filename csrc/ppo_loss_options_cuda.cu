// ppo_loss_options_cuda.cu
// Computes  see ppo_loss_options.h
// Bytes     41 per token in fp32 as without options, and 4 for each further tensor and its gradient; the mask and, for
//           ratios of sequences, two inputs and a gradient twice
// Launch    one warp per row up to T = 512, else one block of 256 threads; where rows do not matter, one warp per 128
//           neighbouring tokens; one kernel if one block is enough, else a second to merge
// Sums      in fp64, variances by Chan's merge, in an order that depends on the numbers of tokens and rows only
// Limits    none

#include "common/launch.h"
#include "common/reduce.cuh"
#include "ppo_loss_options_entry.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kMaxParts = kBlock;       // so that one block merges them, one each thread
constexpr int64_t kWarpPerRow = 512;        // tokens
constexpr int64_t kTokensPerSegment = 128;  // of a warp, where rows do not matter

// ---- device helpers ----

// Reads and writes entry i of the job's arrays.
struct Entry {
  int64_t i;

  template <class A>
  PPO_HD A operator()(const A* from) const {
    return from[i];
  }

  template <class A>
  PPO_HD void operator()(A value, A* to) const {
    to[i] = value;
  }
};

// What a first pass over a row finds.
struct RowTotals {
  double count, log_ratios;
};

PPO_HD RowTotals row_totals_merge(const RowTotals& a, const RowTotals& b) {
  return {a.count + b.count, a.log_ratios + b.log_ratios};
}

template <int kThreads, class A>
__device__ __forceinline__ PPORow<A> row_of(const PPOOptionsJob<A>& job, int64_t row, int64_t begin, int64_t end) {
  RowTotals totals{0, 0};
  for (int64_t i = begin + thread_of_group<kThreads>(); i < end; i += kThreads) {
    if (!job.mask[i]) continue;
    totals.count += 1;
    if (job.options.ratio_level != kTokenRatio) totals.log_ratios += double(job.logprobs[i] - job.old_logprobs[i]);
  }
  totals = share_first<kThreads>(
      reduce_group<kThreads>(totals, [](const RowTotals& a, const RowTotals& b) { return row_totals_merge(a, b); }));
  return ppo_row(job, row, totals.count, totals.log_ratios);
}

// Fills the results of token i, adds its terms to the sums and gives its gradient by the ratio of its sequence.
template <class A>
__device__ __forceinline__ double fill_token(const PPOOptionsJob<A>& job, const PPORow<A>& row, int64_t i,
                                             PPOOptionSums& sums) {
  if (!job.mask[i]) {
    ppo_write_options(PPOOptionTerms<A>{}, job, Entry{i});  // zeros
    return 0;
  }
  const PPOOptionToken<A> x = ppo_read_options<A>(job, Entry{i});
  const PPOOptionTerms<A> terms = ppo_option_terms(x, row, job, job.options);
  ppo_write_options(terms, job, Entry{i});
  sums = ppo_option_merge(sums, ppo_option_sums_of(x, terms));
  return terms.grad_row;
}

template <int kThreads, class A>
__device__ __forceinline__ void fill_row(const PPOOptionsJob<A>& job, int64_t r, int64_t length, PPOOptionSums& sums) {
  const int thread = thread_of_group<kThreads>();
  const int64_t begin = r * length, end = begin + length < job.tokens ? begin + length : job.tokens;
  const PPORow<A> row = job.options.by_row() ? row_of<kThreads>(job, r, begin, end) : PPORow<A>{A(1), A(1), A(1), 1.0};
  double slopes = 0;
  for (int64_t i = begin + thread; i < end; i += kThreads) slopes += fill_token(job, row, i, sums);
  if (thread == 0 && row.count > 0) sums.rows += 1;
  if (job.options.ratio_level != kSequenceRatio) return;
  slopes = share_first<kThreads>(reduce_group<kThreads>(slopes, [](double a, double b) { return a + b; }));
  const A share = ppo_row_gradient(row, slopes);
  for (int64_t i = begin + thread; i < end; i += kThreads)  // each thread the tokens that it has written
    if (job.mask[i]) job.grad_logprobs[i] += share;
}

__device__ __forceinline__ PPOOptionSums merge_block(const PPOOptionSums& sums) {
  return reduce_group<kBlock>(sums,
                              [](const PPOOptionSums& a, const PPOOptionSums& b) { return ppo_option_merge(a, b); });
}

// ---- kernels ----

// With `parts` each block leaves its sums there, without it there is one block, which finishes the statistics.
template <int kThreads, class A>
__global__ void __launch_bounds__(kBlock)
    ppo_loss_options_kernel(const PPOOptionsJob<A> job, int64_t rows, int64_t length, PPOOptionSums* parts) {
  constexpr int kGroups = kBlock / kThreads;
  PPOOptionSums sums = ppo_no_option_sums();
  for (int64_t r = int64_t(blockIdx.x) * kGroups + threadIdx.x / kThreads; r < rows; r += int64_t(gridDim.x) * kGroups)
    fill_row<kThreads>(job, r, length, sums);
  sums = merge_block(sums);
  if (threadIdx.x != 0) return;
  if (parts) {
    parts[blockIdx.x] = sums;
  } else {
    ppo_write_option_stats(sums, job);
  }
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    finish_options_kernel(const PPOOptionsJob<A> job, const PPOOptionSums* parts, int count) {
  const PPOOptionSums sums = merge_block(int(threadIdx.x) < count ? parts[threadIdx.x] : ppo_no_option_sums());
  if (threadIdx.x == 0) ppo_write_option_stats(sums, job);
}

template <class A>
__global__ void __launch_bounds__(kBlock) options_backward_kernel(const PPOOptionsBackwardJob<A> job) {
  const A grad_scale = job.stats[kGradScale], scale = *job.grad_loss * grad_scale;
  for (int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x; i < job.tokens; i += int64_t(gridDim.x) * kBlock) {
#pragma unroll
    for (int k = 0; k < kPPOGradients; ++k)
      if (job.grads[k]) job.out[k][i] = scaled_gradient(job.grads[k][i], scale, grad_scale);
  }
}

// ---- launchers ----

struct OptionsOnCUDA {
  template <class A>
  static void forward(const PPOOptionsJob<A>& job, const Tensor& like) {
    const int64_t length = job.options.by_row() ? std::max<int64_t>(job.row_length, 1) : kTokensPerSegment;
    if (length <= kWarpPerRow) {
      launch<kWarp>(job, length, like);
    } else {
      launch<kBlock>(job, length, like);
    }
  }

  template <int kThreads, class A>
  static void launch(const PPOOptionsJob<A>& job, int64_t length, const Tensor& like) {
    const Launcher launch("ppo_loss", like);
    const int64_t rows = divide_up(job.tokens, length);
    const int64_t parts = std::max<int64_t>(1, std::min(kMaxParts, divide_up(rows, kBlock / kThreads)));
    if (parts == 1) {
      launch(ppo_loss_options_kernel<kThreads, A>, 1, kBlock, job, rows, length, nullptr);
      return;
    }
    const Tensor scratch = new_parts<PPOOptionSums>(like, parts);
    PPOOptionSums* const partial = pointer<PPOOptionSums>(scratch);
    launch(ppo_loss_options_kernel<kThreads, A>, parts, kBlock, job, rows, length, partial);
    launch(finish_options_kernel<A>, 1, kBlock, job, partial, int(parts));
  }

  template <class A>
  static void backward(const PPOOptionsBackwardJob<A>& job, const Tensor& like) {
    const Launcher launch("ppo_loss", like);
    launch(options_backward_kernel<A>, divide_up(job.tokens, kBlock), kBlock, job);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) {
  m.impl("_ppo_loss_options", TORCH_BOX(&ppo_loss_options<OptionsOnCUDA>));
  m.impl("_ppo_loss_options_backward", TORCH_BOX(&ppo_loss_options_backward<OptionsOnCUDA>));
}

}  // namespace ppo_ext
