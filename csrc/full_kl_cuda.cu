// full_kl_cuda.cu
// Computes  see full_kl.h
// Bytes     forward 2*N*V*s + 20N, backward 3*N*V*s + 20N   (s = size of a logit; each logit once per pass)
// Launch    forward one block of 256 threads per row, one warp per row up to V = 1024, one thread up to 8; backward one
//           block per 64 KiB of a row; 16-byte accesses at any alignment, single ones if the stride of V is not 1
// Sums      online maxima and sums in fp32 (fp64 for fp64 and up to V = 8), merged in an order that depends on V only
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
                                           GapScale<A> scale) {
  if (top[0] > state.max || top[1] > state.ref_max) {
    A max = state.max, ref_at_max = state.ref_at_max;
    if (top[0] > state.max) {
      max = top[0];
#pragma unroll
      for (int k = kCount - 1; k >= 0; --k) ref_at_max = x[0][k] == max ? x[1][k] : ref_at_max;
      ref_at_max = kl_pivot(ref_at_max);
    }
    state = kl_rescale(state, max, ref_at_max, top[1] > state.ref_max ? top[1] : state.ref_max, scale);
  }
  const A origin = finite_origin(state.max), ref_origin = finite_origin(state.ref_max);
  const A shrunk_pivot = state.ref_at_max * scale.shrink, to_log2 = scale.inverse * A(kLog2E);
  A sum = 0, ref_sum = 0, weighted = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const A d = x[0][k] - origin;
    const A e = exp2_of(d * to_log2);
    sum += e;
    ref_sum += exp2_of((x[1][k] - ref_origin) * to_log2);
    // Where the policy's probability is 0 the term is 0, even if the reference's logit is -inf. A NaN remains NaN.
    weighted += e == A(0) ? A(0) : e * kl_gap(d, x[1][k], shrunk_pivot, scale.shrink);
  }
  state.sum += sum;
  state.ref_sum += ref_sum;
  state.weighted += weighted;
}

template <class S, class A>
__device__ __forceinline__ void write_row(const KLState<S>& state, const KLRow<S>& result, A* kl,
                                          const KLRowStats<A>& out, int64_t n) {
  kl[n] = A(result.kl);
  out.max[n] = A(state.max);
  out.sum[n] = A(state.sum);
  out.ref_at_max[n] = A(state.ref_at_max);
  out.mean_gap[n] = A(result.mean_gap);
}

// ---- kernels ----

template <int kThreads, bool kAligned, class T, class A>
__global__ void __launch_bounds__(kBlock, sizeof(A) == 8 ? 1 : 3)
    forward_kernel(const KLInputs<T, A> in, A* kl, const KLRowStats<A> out) {
  constexpr int kGroups = kBlock / kThreads;
  for (int64_t n = int64_t(blockIdx.x) * kGroups + threadIdx.x / kThreads; n < in.rows.rows;
       n += int64_t(gridDim.x) * kGroups) {
    const GapScale<A> scale = GapScale<A>::of(in.inv_temperature.of(n));
    KLState<A> state = kl_empty<A>();
    KLRow<A> result{};
    if (!in.mask || in.mask[n]) {
      read_rows<kThreads, kAligned>(rows_of(in, n),
                                    [&](const auto& x, const auto& top) { add_logits(state, x, top, scale); });
      state = reduce_group<kThreads>(
          state, [scale](const KLState<A>& a, const KLState<A>& b) { return kl_merge(a, b, scale); });
      result = kl_of_row(state, scale);
    } else {
      state.max = 0;
    }
    if (thread_of_group<kThreads>() == 0) write_row(state, result, kl, out, n);
  }
}

template <class T, class A>
__global__ void __launch_bounds__(kBlock, 1)
    few_columns_kernel(const KLInputs<T, A> in, A* kl, const KLRowStats<A> out) {
  for (int64_t n = int64_t(blockIdx.x) * kBlock + threadIdx.x; n < in.rows.rows; n += int64_t(gridDim.x) * kBlock) {
    KLState<double> state{};
    KLRow<double> result{};
    if (!in.mask || in.mask[n]) {
      const GapScale<double> scale = GapScale<double>::of(double(in.inv_temperature.of(n)));
      state = kl_state_of_row(row_pair(in, n), scale);
      result = kl_of_row(state, scale);
    }
    write_row(state, result, kl, out, n);
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
    const A c = in.inv_temperature.of(n);
    const KLRowGrad<A> grad = kl_grad_of_row(out.grad_kl[n], saved.max[n], saved.sum[n], saved.ref_at_max[n],
                                             saved.mean_gap[n], GapScale<A>::of(c));
    const A to_log2 = c * A(kLog2E);
    const auto grad_of = [=](const A(&x)[2]) {
      const A d = x[0] - grad.max;
      return kl_logit_grad(exp2_of(d * to_log2), d, x[1], grad);
    };
    write_tile<kBlock, kAligned>(rows_of(in, n), row, out.rows.stride_v, tile, grad_of, -1, [](A x) { return x; });
  }
}

// ---- launchers ----

struct OnCUDA {
  template <class T, class A>
  static void forward(const KLInputs<T, A>& in, A* kl, const KLRowStats<A>& out, const Tensor& like) {
    const Launcher launch("full_kl", like);
    if (in.rows.V <= kFewColumns) {
      launch(few_columns_kernel<T, A>, divide_up(in.rows.rows, kBlock), kBlock, in, kl, out);
      return;
    }
    if (in.rows.V <= kWarpPerRow) {
      launch(forward_kernel<kWarp, false, T, A>, divide_up(in.rows.rows, kBlock / kWarp), kBlock, in, kl, out);
      return;
    }
    const bool aligned = all_aligned(in.logits, in.rows) && all_aligned(in.ref_logits, in.ref_rows);
    launch(aligned ? forward_kernel<kBlock, true, T, A> : forward_kernel<kBlock, false, T, A>, in.rows.rows, kBlock, in,
           kl, out);
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
