// full_kl_cuda.cu
// Computes  see full_kl.h
// Bytes     forward 2*N*V*s + 20N, backward 3*N*V*s + 24N   (s = size of a logit; each logit once per pass)
// Launch    forward one block of 256 threads per row, one warp per row up to V = 1024; backward one block per 64 KiB of
//           a row; 16-byte accesses at any alignment, single ones if the stride of V is not 1
// Sums      online maxima and sums in fp32 (fp64 for fp64), merged in an order that depends on V only
// Limits    masked rows are not read

#include "common/launch.h"
#include "common/load.cuh"
#include "common/reduce.cuh"
#include "common/tiles.cuh"
#include "full_kl_entry.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kWarpPerRow = 1024;  // up to this V a warp reads a row faster than a block can merge its parts

// ---- device helpers ----

template <class T, class A>
__device__ __forceinline__ Rows<T, 2> rows_of(const KLInputs<T, A>& in, int64_t n) {
  return {{in.logits + in.rows.offset(n), in.ref_logits + in.ref_rows.offset(n)},
          {in.rows.stride_v, in.ref_rows.stride_v},
          in.rows.V};
}

template <class A>
__device__ __forceinline__ A finite_origin(A max) {
  return max == A(-INFINITY) ? A(0) : max;  // as -inf - -inf would be NaN
}

template <class A, int kCount>
__device__ __forceinline__ void add_logits(KLState<A>& state, const A (&x)[2][kCount], const A (&top)[2],
                                           A inv_temperature) {
  if (top[0] > state.max || top[1] > state.ref_max) {
    const A max = top[0] > state.max ? top[0] : state.max, ref_max = top[1] > state.ref_max ? top[1] : state.ref_max;
    state = kl_rescale(state, max, ref_max, inv_temperature);
  }
  const A origin = finite_origin(state.max), ref_origin = finite_origin(state.ref_max);
  const A scale = inv_temperature * A(kLog2E);
  A sum = 0, ref_sum = 0, weighted = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const A y = (x[0][k] - origin) * scale, ref_y = (x[1][k] - ref_origin) * scale;
    const A e = exp2_of(y);
    sum += e;
    ref_sum += exp2_of(ref_y);
    // Where the policy's probability is 0 the term is 0, even if the reference's logit is -inf. A NaN remains NaN.
    weighted += e == A(0) ? A(0) : e * (y - ref_y);
  }
  state.sum += sum;
  state.ref_sum += ref_sum;
  state.weighted += A(kLn2) * weighted;
}

// ---- kernels ----

template <int kThreads, bool kAligned, class T, class A>
__global__ void __launch_bounds__(kBlock, sizeof(A) == 8 ? 1 : 3)
    forward_kernel(const KLInputs<T, A> in, const KLRowStats<A> out) {
  constexpr int kGroups = kBlock / kThreads;
  for (int64_t n = int64_t(blockIdx.x) * kGroups + threadIdx.x / kThreads; n < in.rows.rows;
       n += int64_t(gridDim.x) * kGroups) {
    const A c = in.inv_temperature.of(n);
    KLState<A> state = kl_empty<A>();
    A kl = 0, log_sum = 0, ref_log_sum = 0;
    if (!in.mask || in.mask[n]) {
      read_rows<kThreads, kAligned>(rows_of(in, n),
                                    [&](const auto& x, const auto& top) { add_logits(state, x, top, c); });
      state =
          reduce_group<kThreads>(state, [c](const KLState<A>& a, const KLState<A>& b) { return kl_merge(a, b, c); });
      log_sum = softmax_log_sum(state.sum);
      ref_log_sum = softmax_log_sum(state.ref_sum);
      kl = row_kl(state);
    } else {
      state.max = state.ref_max = 0;
    }
    if (thread_of_group<kThreads>() != 0) continue;
    out.kl[n] = kl;
    out.max[n] = state.max;
    out.log_sum[n] = log_sum;
    out.ref_max[n] = state.ref_max;
    out.ref_log_sum[n] = ref_log_sum;
  }
}

template <bool kAligned, class T, class A>
__global__ void __launch_bounds__(kBlock, sizeof(A) == 8 ? 1 : 3)
    backward_kernel(const KLInputs<T, A> in, const KLRowStats<A> saved, const KLGradient<T, A> out, int64_t tiles) {
  for (int64_t i = blockIdx.x; i < in.rows.rows * tiles; i += gridDim.x) {
    const int64_t n = i / tiles, tile = i % tiles;
    T* const row = out.grad + out.rows.offset(n);
    if (in.mask && !in.mask[n]) {
      zero_tile<kBlock>(row, out.rows.stride_v, in.rows.V, tile);
      continue;
    }
    const A log_sum = saved.log_sum[n], max = saved.max[n], ref_max = saved.ref_max[n], c = in.inv_temperature.of(n),
            scale = c * A(kLog2E);
    // p (log p - log q - kl) in terms of y = log2(p * sum of the row), and of the same for q.
    const A share = out.grad_kl[n] * c * A(exp(-log_sum));
    const A at_zero = share * ((saved.ref_log_sum[n] - log_sum) - saved.kl[n]), slope = share * A(kLn2);
    const auto grad_of = [=](const A(&x)[2]) {
      const A y = (x[0] - max) * scale, ref_y = (x[1] - ref_max) * scale;
      const A e = exp2_of(y);
      return e == A(0) ? A(0) : e * (at_zero + slope * (y - ref_y));
    };
    write_tile<kBlock, kAligned>(rows_of(in, n), row, out.rows.stride_v, tile, grad_of, -1, [](A x) { return x; });
  }
}

// ---- launchers ----

struct OnCUDA {
  template <class T, class A>
  static void forward(const KLInputs<T, A>& in, const KLRowStats<A>& out, const Tensor& like) {
    const Launcher launch("full_kl", like);
    if (in.rows.V <= kWarpPerRow) {
      launch(forward_kernel<kWarp, false, T, A>, divide_up(in.rows.rows, kBlock / kWarp), kBlock, in, out);
      return;
    }
    const bool aligned = all_aligned(in.logits, in.rows) && all_aligned(in.ref_logits, in.ref_rows);
    launch(aligned ? forward_kernel<kBlock, true, T, A> : forward_kernel<kBlock, false, T, A>, in.rows.rows, kBlock, in,
           out);
  }

  template <class T, class A>
  static void backward(const KLInputs<T, A>& in, const KLRowStats<A>& saved, const KLGradient<T, A>& out,
                       const Tensor& grad) {
    const Launcher launch("full_kl", grad);
    const int64_t tiles = divide_up(in.rows.V, kTile<T>);  // per row
    const bool aligned =
        all_aligned(in.logits, in.rows) && all_aligned(in.ref_logits, in.ref_rows) && all_aligned(out.grad, out.rows);
    launch(aligned ? backward_kernel<true, T, A> : backward_kernel<false, T, A>, in.rows.rows * tiles, kBlock, in,
           saved, out, tiles);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) {
  m.impl("_full_kl", TORCH_BOX(&full_kl<OnCUDA>));
  m.impl("_full_kl_backward", TORCH_BOX(&full_kl_backward<OnCUDA>));
  m.impl("_full_kl_backward_", TORCH_BOX(&full_kl_backward_inplace<OnCUDA>));
}

}  // namespace ppo_ext
