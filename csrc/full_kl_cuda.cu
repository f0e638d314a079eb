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
#include "common/rows.h"
#include "common/tiles.cuh"
#include "full_kl.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kWarpPerRow = 1024;  // up to this V a warp reads a row faster than a block can merge its parts

template <class T, class A>
struct Inputs {
  const T *logits, *ref_logits;
  LogitRows rows, ref_rows;
  const bool* mask;
  A inv_temperature;

  __device__ __forceinline__ Rows<T, 2> at(int64_t n) const {
    return {{logits + rows.offset(n), ref_logits + ref_rows.offset(n)}, {rows.stride_v, ref_rows.stride_v}, rows.V};
  }
};

template <class A>
struct RowStats {
  A *kl, *max, *log_sum, *ref_max, *ref_log_sum;  // written forward, read backward
};

template <class T>
struct Gradient {
  T* grad;
  LogitRows rows;
  int64_t tiles;  // per row
};

// ---- device helpers ----

template <class A>
__device__ __forceinline__ A finite_origin(A max) {
  return max == A(-INFINITY) ? A(0) : max;  // nothing but -inf so far: -inf - -inf must not spread
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
    // Where the policy has no probability the term is 0, even against a -inf of the reference; a NaN stays.
    weighted += e == A(0) ? A(0) : e * (y - ref_y);
  }
  state.sum += sum;
  state.ref_sum += ref_sum;
  state.weighted += A(kLn2) * weighted;
}

// ---- kernels ----

template <int kThreads, bool kAligned, class T, class A>
__global__ void __launch_bounds__(kBlock, sizeof(A) == 8 ? 1 : 3)
    forward_kernel(const Inputs<T, A> in, const RowStats<A> out) {
  constexpr int kGroups = kBlock / kThreads;
  const A c = in.inv_temperature;
  for (int64_t n = int64_t(blockIdx.x) * kGroups + threadIdx.x / kThreads; n < in.rows.rows;
       n += int64_t(gridDim.x) * kGroups) {
    KLState<A> state = kl_empty<A>();
    A kl = 0, log_sum = 0, ref_log_sum = 0;
    if (!in.mask || in.mask[n]) {
      read_rows<kThreads, kAligned>(in.at(n), [&](const auto& x, const auto& top) { add_logits(state, x, top, c); });
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
    backward_kernel(const Inputs<T, A> in, const RowStats<A> saved, const A* grad_kl, const Gradient<T> out) {
  for (int64_t i = blockIdx.x; i < in.rows.rows * out.tiles; i += gridDim.x) {
    const int64_t n = i / out.tiles, tile = i % out.tiles;
    T* const row = out.grad + out.rows.offset(n);
    if (in.mask && !in.mask[n]) {
      zero_tile<kBlock>(row, out.rows.stride_v, in.rows.V, tile);
      continue;
    }
    const A log_sum = saved.log_sum[n], max = saved.max[n], ref_max = saved.ref_max[n],
            scale = in.inv_temperature * A(kLog2E);
    // p (log p - log q - kl) in terms of y = log2 of p times the row's sum, and of the same of q.
    const A share = grad_kl[n] * in.inv_temperature * A(exp(-log_sum));
    const A at_zero = share * ((saved.ref_log_sum[n] - log_sum) - saved.kl[n]), slope = share * A(kLn2);
    const auto grad_of = [=](const A(&x)[2]) {
      const A y = (x[0] - max) * scale, ref_y = (x[1] - ref_max) * scale;
      const A e = exp2_of(y);
      return e == A(0) ? A(0) : e * (at_zero + slope * (y - ref_y));
    };
    write_tile<kBlock, kAligned>(in.at(n), row, out.rows.stride_v, tile, grad_of, -1, [](A x) { return x; });
  }
}

// ---- entry points ----

template <class T, class A>
Inputs<T, A> inputs_of(const Tensor& logits, const Tensor& ref_logits, const std::optional<Tensor>& mask,
                       double temperature) {
  return {pointer<T>(logits),
          pointer<T>(ref_logits),
          logit_rows("full_kl", "logits", logits),
          logit_rows("full_kl", "ref_logits", ref_logits),
          mask_pointer(mask),
          A(1.0 / temperature)};
}

struct StatTensors {
  const Tensor &kl, &max, &log_sum, &ref_max, &ref_log_sum;

  template <class A>
  RowStats<A> pointers() const {
    return {pointer<A>(kl), pointer<A>(max), pointer<A>(log_sum), pointer<A>(ref_max), pointer<A>(ref_log_sum)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> full_kl_cuda(Tensor logits, Tensor ref_logits,
                                                                std::optional<Tensor> mask, double temperature) {
  check_full_kl(logits, ref_logits, mask, temperature);
  const Launcher launch("full_kl", logits);
  const auto row = [&] { return new_token_tensor(logits, logits.dim() - 1, accumulate_dtype(logits.scalar_type())); };
  Tensor kl = row(), max = row(), log_sum = row(), ref_max = row(), ref_log_sum = row();
  dispatch_logits("full_kl", logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Inputs<T, A> in = inputs_of<T, A>(logits, ref_logits, mask, temperature);
    const RowStats<A> out = StatTensors{kl, max, log_sum, ref_max, ref_log_sum}.pointers<A>();
    if (in.rows.V <= kWarpPerRow) {
      launch(forward_kernel<kWarp, false, T, A>, divide_up(in.rows.rows, kBlock / kWarp), kBlock, in, out);
    } else {
      const bool aligned = all_aligned(in.logits, in.rows) && all_aligned(in.ref_logits, in.ref_rows);
      launch(aligned ? forward_kernel<kBlock, true, T, A> : forward_kernel<kBlock, false, T, A>, in.rows.rows, kBlock,
             in, out);
    }
  });
  return {kl, max, log_sum, ref_max, ref_log_sum};
}

void run_backward(const Tensor& logits, const Tensor& ref_logits, const Tensor& grad_kl,
                  const std::optional<Tensor>& mask, const StatTensors& saved, double temperature, const Tensor& grad) {
  check_full_kl(logits, ref_logits, mask, temperature);
  check_row_stats("full_kl", logits,
                  {{"grad_kl", grad_kl},
                   {"kl", saved.kl},
                   {"row_max", saved.max},
                   {"log_sum", saved.log_sum},
                   {"ref_row_max", saved.ref_max},
                   {"ref_log_sum", saved.ref_log_sum}});
  const Launcher launch("full_kl", logits);
  dispatch_logits("full_kl", logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Inputs<T, A> in = inputs_of<T, A>(logits, ref_logits, mask, temperature);
    const Gradient<T> out{pointer<T>(grad), logit_rows("full_kl", "grad", grad), divide_up(in.rows.V, kTile<T>)};
    const bool aligned =
        all_aligned(in.logits, in.rows) && all_aligned(in.ref_logits, in.ref_rows) && all_aligned(out.grad, out.rows);
    launch(aligned ? backward_kernel<true, T, A> : backward_kernel<false, T, A>, in.rows.rows * out.tiles, kBlock, in,
           saved.pointers<A>(), pointer<A>(grad_kl), out);
  });
}

Tensor full_kl_backward_cuda(Tensor logits, Tensor ref_logits, Tensor grad_kl, std::optional<Tensor> mask, Tensor kl,
                             Tensor max, Tensor log_sum, Tensor ref_max, Tensor ref_log_sum, double temperature) {
  Tensor grad = new_token_tensor(logits, logits.dim(), logits.scalar_type());
  run_backward(logits, ref_logits, grad_kl, mask, {kl, max, log_sum, ref_max, ref_log_sum}, temperature, grad);
  return grad;
}

void full_kl_backward_inplace_cuda(Tensor logits, Tensor ref_logits, Tensor grad_kl, std::optional<Tensor> mask,
                                   Tensor kl, Tensor max, Tensor log_sum, Tensor ref_max, Tensor ref_log_sum,
                                   double temperature) {
  require_no_overlap("full_kl", "logits", logits);
  run_backward(logits, ref_logits, grad_kl, mask, {kl, max, log_sum, ref_max, ref_log_sum}, temperature, logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) {
  m.impl("_full_kl", TORCH_BOX(&full_kl_cuda));
  m.impl("_full_kl_backward", TORCH_BOX(&full_kl_backward_cuda));
  m.impl("_full_kl_backward_", TORCH_BOX(&full_kl_backward_inplace_cuda));
}

}  // namespace ppo_ext
