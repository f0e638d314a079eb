// linear_logprobs_cuda.cu
// Computes  see linear_logprobs.h; ppo_ext/ops/linear_logprobs.py makes the tiles, by torch's matrix product
// Bytes     fold N*C*4 + 64N, gradient 2*N*C*4 + 32N of a tile of C columns   (8 for 4 in fp64)
// Launch    fold one block of 256 threads per row; gradient one block per 64 KiB of a row; 16-byte accesses
// Sums      online max and sums in fp32 (fp64 for fp64) in one tile, merged in an order that depends on C only; over the
//           tiles of a row in fp64
// Limits    a label that is in no tile leaves its row's results NaN

#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/tiles.cuh"
#include "linear_logprobs_entry.h"
#include "logprobs_cuda.cuh"

namespace ppo_ext {
namespace {

constexpr int kBlock = 256;
constexpr int kPacks = 4;  // that a thread loads before it uses the first one

// ---- device helpers ----

// What one thread, or several, read of a row of a tile: as in LinearState, in the arithmetic of the tile.
template <class A>
struct TilePart {
  SoftmaxState<A> softmax;
  A squares, total, best;
  int best_column;
};

template <class A>
__device__ __forceinline__ TilePart<A> merge_parts(const TilePart<A>& a, const TilePart<A>& b, A inv_temperature) {
  const SoftmaxState<A> softmax = softmax_merge(a.softmax, b.softmax, inv_temperature);
  const bool second = b.best > a.best || (b.best == a.best && b.best_column < a.best_column);
  const A squares = squares_at(a.softmax, a.squares, softmax.max, inv_temperature) +
                    squares_at(b.softmax, b.squares, softmax.max, inv_temperature);
  return {softmax, squares, a.total + b.total, second ? b.best : a.best, second ? b.best_column : a.best_column};
}

// Calls f(x, column) for this thread's pieces of a row: column(k) is that of x[k], an array of one of three lengths.
template <class A, class F>
__device__ __forceinline__ void read_tile_row(const A* row, int64_t width, const F& f) {
  const Pack* const in = reinterpret_cast<const Pack*>(row);
  const int packs = int(width / kPack<A>);
  int i = int(threadIdx.x);
  const auto column = [&](int k) { return (i + k / kPack<A> * kBlock) * kPack<A> + k % kPack<A>; };
  for (; i + (kPacks - 1) * kBlock < packs; i += kPacks * kBlock) {
    Pack loaded[kPacks];
    A x[kPacks * kPack<A>];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) loaded[k] = load_pack(in + i + k * kBlock);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) unpack<A>(loaded[k], x + k * kPack<A>);
    f(x, column);
  }
  for (; i < packs; i += kBlock) {
    A x[kPack<A>];
    unpack<A>(load_pack(in + i), x);
    f(x, column);
  }
  const int last = packs * kPack<A> + int(threadIdx.x);
  if (last < width) {
    const A one[1] = {row[last]};
    f(one, [&](int) { return last; });
  }
}

// Adds sum e^2, sum z and the largest z of some logits to a part whose sums are relative to its new maximum already.
template <class A, int kCount, class Column>
__device__ __forceinline__ void add_statistics(TilePart<A>& part, const A (&z)[kCount], const Column& column, A top,
                                               A inv_temperature) {
  const A origin = part.softmax.max == A(-INFINITY) ? A(0) : part.softmax.max, scale = 2 * inv_temperature * A(kLog2E);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    part.squares += exp2_of((z[k] - origin) * scale);
    part.total += z[k];
  }
  if (!(top > part.best)) return;
  part.best = top;
#pragma unroll
  for (int k = kCount - 1; k >= 0; --k)
    if (z[k] == top) part.best_column = column(k);
}

template <bool kStatistics, class A, int kCount, class Column>
__device__ __forceinline__ void add_part(TilePart<A>& part, const A (&x)[kCount], const Column& column,
                                         const LinearFoldJob<A>& job, A inv_temperature) {
  A z[kCount], top = A(-INFINITY);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    z[k] = job.map.is_identity() ? x[k] : job.map.logit(x[k]);
    top = larger(top, z[k]);
  }
  if (kStatistics && top > part.softmax.max)
    part.squares = squares_at(part.softmax, part.squares, top, inv_temperature);
  job.with_entropy ? add_logits<true>(part.softmax, z, top, inv_temperature)
                   : add_logits<false>(part.softmax, z, top, inv_temperature);
  if (kStatistics) add_statistics(part, z, column, top, inv_temperature);
}

// ---- kernels ----

template <bool kStatistics, class A>
__global__ void __launch_bounds__(kBlock, sizeof(A) == 8 ? 1 : 3) fold_kernel(const LinearFoldJob<A> job) {
  const LogitTile<A>& tile = job.tile;
  for (int64_t n = blockIdx.x; n < tile.rows; n += gridDim.x) {
    const A c = job.inv_temperature.of(n);
    TilePart<A> part{softmax_empty<A>(), A(0), A(0), A(-INFINITY), -1};
    read_tile_row(tile.row(n), tile.width,
                  [&](const auto& x, const auto& column) { add_part<kStatistics>(part, x, column, job, c); });
    part = reduce_group<kBlock>(part, [c](const TilePart<A>& a, const TilePart<A>& b) { return merge_parts(a, b, c); });
    if (threadIdx.x != 0) continue;
    const int64_t label = job.labels[n];
    const double target = tile.has(label) ? double(job.map.logit(tile.row(n)[label - tile.first])) : double(NAN);
    const SoftmaxState<double> softmax{part.softmax.max, part.softmax.sum, part.softmax.weighted};
    const LinearState before = tile.first == 0 ? linear_empty() : job.states[n];
    const LinearState state = linear_merge(
        before, {softmax, part.squares, part.total, target, part.best, double(tile.first + part.best_column)},
        double(c));
    job.states[n] = state;
    if (tile.is_last()) linear_results(state, label, tile.V, double(c), job.results + n * kLinearResults);
  }
}

template <bool kEntropy, bool kMapped, class A>
__global__ void __launch_bounds__(kBlock, sizeof(A) == 8 ? 1 : 4)
    gradient_kernel(const LinearGradientJob<A> job, int64_t parts) {
  const LogitTile<A>& tile = job.tile;
  for (int64_t i = blockIdx.x; i < tile.rows * parts; i += gridDim.x) {
    const int64_t n = i / parts, label = job.labels[n];
    const A c = job.inv_temperature.of(n), max = job.max[n], log_sum = job.log_sum[n];
    const A g = job.grad_logprobs[n], h = kEntropy ? job.grad_entropy[n] : A(0);
    const A entropy = kEntropy ? job.entropy[n] : A(0);
    const LogitMap<A> map = job.map;
    const RowGradient<kEntropy, A> row(logit_grad_of_row(g, h, entropy, c), max, log_sum, c);
    const auto grad_of = [=](const A(&x)[1]) {
      if (!kMapped) return row.of(x[0]);
      const A z = map.logit(x[0]);
      return row.of(z) * map.slope(z);
    };
    const auto grad_of_label = [=](A x) {
      const A z = kMapped ? map.logit(x) : x;
      const A grad = token_logit_grad(token_logprob(z, max, log_sum, c), g, h, entropy, c);
      return kMapped ? grad * map.slope(z) : grad;
    };
    const Rows<A, 1> logits{{tile.row(n)}, {1}, tile.width};
    write_tile<kBlock, true>(logits, tile.row(n), 1, i % parts, grad_of, tile.has(label) ? label - tile.first : -1,
                             grad_of_label);
  }
}

// ---- launchers ----

struct OnCUDA {
  template <class A>
  static void fold(const LinearFoldJob<A>& job, const Tensor& tile) {
    const auto kernel = job.with_statistics ? fold_kernel<true, A> : fold_kernel<false, A>;
    Launcher("linear_logprobs", tile)(kernel, job.tile.rows, kBlock, job);
  }

  template <class A>
  static void gradient(const LinearGradientJob<A>& job, const Tensor& tile) {
    const Launcher launch("linear_logprobs", tile);
    job.grad_entropy ? launch_gradient<true>(launch, job) : launch_gradient<false>(launch, job);
  }

 private:
  template <bool kEntropy, class A>
  static void launch_gradient(const Launcher& launch, const LinearGradientJob<A>& job) {
    const int64_t parts = divide_up(job.tile.width, kTile<A>);
    const auto kernel =
        job.map.is_identity() ? gradient_kernel<kEntropy, false, A> : gradient_kernel<kEntropy, true, A>;
    launch(kernel, job.tile.rows * parts, kBlock, job, parts);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) {
  m.impl("_linear_logprobs_fold", TORCH_BOX(&linear_logprobs_fold<OnCUDA>));
  m.impl("_linear_logprobs_gradient", TORCH_BOX(&linear_logprobs_gradient<OnCUDA>));
}

}  // namespace ppo_ext
