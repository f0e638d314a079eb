// logprobs_cuda.cu
// Computes  see logprobs.h
// Bytes     forward N*V*s + 24N, backward 2*N*V*s + 32N   (s = size of a logit; each logit once per pass)
// Launch    forward one block of 256 threads per row, one warp per row up to V = 1024; backward one block per 64 KiB of
//           a row; 16-byte accesses at any alignment, single ones if the stride of V is not 1
// Sums      online max and sums in fp32 (fp64 for fp64), merged in an order that depends on V only
// Limits    a label outside [0, V) on a counted row is not read: the row becomes NaN and its gradient 0

#include "common/launch.h"
#include "common/load.cuh"
#include "common/reduce.cuh"
#include "common/tiles.cuh"
#include "logprobs_cuda.cuh"
#include "logprobs_entry.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kWarpPerRow = 1024;  // up to this V a warp reads a row faster than a block can merge its parts

// ---- device helpers ----

// Counts the labels outside [0, V). The first that is counted leaves its row, its id and V.
__device__ __forceinline__ void note_label(int64_t* note, int64_t row, int64_t label, int64_t V) {
  if (atomicAdd(reinterpret_cast<unsigned long long*>(note), 1ull) != 0) return;
  note[1] = row;
  note[2] = label;
  note[3] = V;
}

// ---- kernels ----

template <int kThreads, bool kAligned, bool kEntropy, class T, class A>
__global__ void __launch_bounds__(kBlock, sizeof(A) == 8 ? 1 : (kAligned ? 4 : 3))
    forward_kernel(const LogprobsJob<T, A> job) {
  constexpr int kGroups = kBlock / kThreads;
  const bool first = thread_of_group<kThreads>() == 0;
  for (int64_t n = int64_t(blockIdx.x) * kGroups + threadIdx.x / kThreads; n < job.rows.rows;
       n += int64_t(gridDim.x) * kGroups) {
    SoftmaxState<A> state = softmax_empty<A>();
    const A c = job.inv_temperature.of(n);
    A logprob = 0, entropy = 0, log_sum = 0;
    if (!job.mask || job.mask[n]) {
      const T* row = job.logits + job.rows.offset(n);
      A picked = A(NAN);
      if (first) {
        const int64_t label = job.labels[n];
        if (uint64_t(label) < uint64_t(job.rows.V)) {
          picked = A(row[label * job.rows.stride_v]);
        } else if (job.label_note) {
          note_label(job.label_note, n, label, job.rows.V);
        }
      }
      read_rows<kThreads, kAligned>(
          Rows<T, 1>{{row}, {job.rows.stride_v}, job.rows.V},
          [&](const auto& x, const auto& top) { add_logits<kEntropy>(state, x[0], top[0], c); });
      state = reduce_group<kThreads>(
          state, [c](const SoftmaxState<A>& a, const SoftmaxState<A>& b) { return softmax_merge(a, b, c); });
      log_sum = softmax_log_sum(state.sum);
      logprob = token_logprob(picked, state.max, log_sum, c);
      if (kEntropy) entropy = picked == picked ? row_entropy(state.sum, log_sum, state.weighted) : picked;
    } else {
      state.max = 0;
    }
    if (!first) continue;
    job.logprobs[n] = logprob;
    if (kEntropy) job.entropy[n] = entropy;
    job.max[n] = state.max;
    job.log_sum[n] = log_sum;
  }
}

template <bool kAligned, bool kEntropy, class T, class A>
__global__ void __launch_bounds__(kBlock, sizeof(A) == 8 ? 2 : (kAligned ? 4 : 3))
    backward_kernel(const LogprobsBackwardJob<T, A> job, int64_t tiles) {
  for (int64_t i = blockIdx.x; i < job.rows.rows * tiles; i += gridDim.x) {
    const int64_t n = i / tiles, tile = i % tiles, stride = job.grad_rows.stride_v;
    T* out = job.grad + job.grad_rows.offset(n);
    const int64_t label = job.labels[n];
    if ((job.mask && !job.mask[n]) || uint64_t(label) >= uint64_t(job.rows.V)) {
      zero_tile<kBlock>(out, stride, job.rows.V, tile);
      continue;
    }
    const A c = job.inv_temperature.of(n);
    const A g = job.grad_logprobs ? job.grad_logprobs[n] : A(0), h = kEntropy ? job.grad_entropy[n] : A(0);
    const A entropy = kEntropy ? job.entropy[n] : A(0), max = job.max[n], log_sum = job.log_sum[n];
    const RowGradient<kEntropy, A> row(logit_grad_of_row(g, h, entropy, c), max, log_sum, c);
    const auto grad_of = [=](const A(&x)[1]) { return row.of(x[0]); };
    const auto grad_of_label = [=](A x) {
      return token_logit_grad(token_logprob(x, max, log_sum, c), g, h, entropy, c);
    };
    const Rows<T, 1> logits{{job.logits + job.rows.offset(n)}, {job.rows.stride_v}, job.rows.V};
    write_tile<kBlock, kAligned>(logits, out, stride, tile, grad_of, label, grad_of_label);
  }
}

// ---- launchers ----

template <int kThreads, bool kAligned, class T, class A>
void launch_forward(const Launcher& launch, const LogprobsJob<T, A>& job) {
  const auto kernel =
      job.entropy ? forward_kernel<kThreads, kAligned, true, T, A> : forward_kernel<kThreads, kAligned, false, T, A>;
  launch(kernel, divide_up(job.rows.rows, kBlock / kThreads), kBlock, job);
}

template <bool kAligned, class T, class A>
void launch_backward(const Launcher& launch, const LogprobsBackwardJob<T, A>& job) {
  const auto kernel = job.grad_entropy ? backward_kernel<kAligned, true, T, A> : backward_kernel<kAligned, false, T, A>;
  const int64_t tiles = divide_up(job.rows.V, kTile<T>);  // per row
  launch(kernel, job.rows.rows * tiles, kBlock, job, tiles);
}

struct OnCUDA {
  template <class T, class A>
  static void forward(const LogprobsJob<T, A>& job, const Tensor& labels) {
    const Launcher launch("logprobs", labels);
    if (job.rows.V <= kWarpPerRow) return launch_forward<kWarp, false>(launch, job);
    if (all_aligned(job.logits, job.rows)) return launch_forward<kBlock, true>(launch, job);
    launch_forward<kBlock, false>(launch, job);
  }

  template <class T, class A>
  static void backward(const LogprobsBackwardJob<T, A>& job, const Tensor& labels, const Tensor&) {
    const Launcher launch("logprobs", labels);
    const bool aligned = all_aligned(job.logits, job.rows) && all_aligned(job.grad, job.grad_rows);
    aligned ? launch_backward<true>(launch, job) : launch_backward<false>(launch, job);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) {
  m.impl("_logprobs", TORCH_BOX(&logprobs<OnCUDA>));
  m.impl("_logprobs_backward", TORCH_BOX(&logprobs_backward<OnCUDA>));
  m.impl("_logprobs_backward_", TORCH_BOX(&logprobs_backward_inplace<OnCUDA>));
}

}  // namespace ppo_ext
