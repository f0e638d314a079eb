// masked_cuda.cu
// Computes  see masked.h
// Bytes     moments 8 per entry in fp32; whitening 20 (it reads the entries again); backward 32
// Launch    blocks of 256 threads: parts of the sums, then one kernel that merges them and writes; the moments of rows
//           of one part take one kernel
// Sums      Chan's merge in fp64, in an order that depends on the number of entries only
// Limits    none

#include "common/launch.h"
#include "common/reduce.cuh"
#include "masked_entry.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kEntriesPerPart = 4096;
constexpr int64_t kMaxParts = kBlock;  // so that one block merges them, one each thread

// Rows of `columns` entries, each summed in `parts` parts by as many blocks.
template <class A>
struct Entries {
  const A *values, *weights;
  int64_t columns;
  int parts;
};

inline int parts_of(int64_t columns) {
  return int(std::max<int64_t>(1, std::min(kMaxParts, divide_up(columns, kEntriesPerPart))));
}

// ---- device helpers ----

__device__ __forceinline__ Moments merge_block(const Moments& m) {
  return reduce_group<kBlock>(m, [](const Moments& a, const Moments& b) { return moments_merge(a, b); });
}

__device__ __forceinline__ GradSums merge_block(const GradSums& s) {
  return reduce_group<kBlock>(s, [](const GradSums& a, const GradSums& b) { return grad_sums_merge(a, b); });
}

// The merge of `count` parts, whole in thread 0.
template <class State>
__device__ __forceinline__ State merge_parts(const State* parts, int count) {
  return merge_block(int(threadIdx.x) < count ? parts[threadIdx.x] : State{});
}

// ---- kernels ----

// Block i sums part i % in.parts of row i / in.parts and leaves it in parts[i]; without `parts` each row has one part,
// whose block writes the row's moments.
template <class A>
__global__ void __launch_bounds__(kBlock)
    moments_kernel(const Entries<A> in, int64_t rows, Moments* parts, A* moments) {
  for (int64_t i = blockIdx.x; i < rows * in.parts; i += gridDim.x) {
    const int64_t row = i / in.parts * in.columns;
    Moments m{};
    for (int64_t c = i % in.parts * kBlock + threadIdx.x; c < in.columns; c += int64_t(in.parts) * kBlock) {
      const double w = in.weights[row + c], x = in.values[row + c];
      if (w != 0.0) m = moments_merge(m, Moments{w, x, x - x});  // x - x: no distance, or NaN where x is infinite
    }
    m = merge_block(m);
    if (threadIdx.x != 0) continue;
    if (parts) {
      parts[i] = m;
    } else {
      write_moments(m, moments + kSavedMoments * i);
    }
  }
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    finish_moments_kernel(const Moments* parts, int count, int64_t rows, A* moments) {
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const Moments m = merge_parts(parts + r * count, count);
    if (threadIdx.x == 0) write_moments(m, moments + kSavedMoments * r);
  }
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    whiten_kernel(const Entries<A> in, const Moments* parts, const WhitenOptions options, A* whitened, A* moments) {
  const Moments m = share_first<kBlock>(merge_parts(parts, in.parts));
  if (blockIdx.x == 0 && threadIdx.x == 0) write_moments(m, moments);
  const double scale = whiten_scale(m, options);
  for (int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x; i < in.columns; i += int64_t(gridDim.x) * kBlock)
    whitened[i] = in.weights[i] == A(0) ? A(0) : A(whiten_one(double(in.values[i]), m.mean, scale, options));
}

template <class A>
__global__ void __launch_bounds__(kBlock) grad_sums_kernel(const Entries<A> in, const A* grad, const A* moments,
                                                           const WhitenOptions options, GradSums* parts) {
  const double mean = options.subtracted(read_moments(moments).mean);
  GradSums sums{};
  for (int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x; i < in.columns; i += int64_t(gridDim.x) * kBlock) {
    if (in.weights[i] == A(0)) continue;
    sums.grad += grad[i];
    sums.centred += double(grad[i]) * (double(in.values[i]) - mean);
  }
  sums = merge_block(sums);
  if (threadIdx.x == 0) parts[blockIdx.x] = sums;
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    whiten_backward_kernel(const Entries<A> in, const A* grad, const A* moments, const GradSums* parts,
                           const WhitenOptions options, A* out) {
  const GradSums sums = share_first<kBlock>(merge_parts(parts, in.parts));
  const WhitenGrad all = whiten_grad_of(read_moments(moments), sums, options);
  for (int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x; i < in.columns; i += int64_t(gridDim.x) * kBlock) {
    const A w = in.weights[i];
    out[i] = w == A(0) ? A(0) : A(whiten_grad(double(grad[i]), double(in.values[i]), double(w), all));
  }
}

// ---- launchers ----

template <class A>
Entries<A> entries_of(const WeightedEntries<A>& in, int64_t columns) {
  Entries<A> result;
  result.values = in.values;
  result.weights = in.weights;
  result.columns = columns;
  result.parts = parts_of(columns);
  return result;
}

// Blocks of a kernel that writes one result per entry.
inline int64_t writing_blocks(int64_t entries) { return divide_up(entries, 4 * kBlock); }

struct OnCUDA {
  template <class A>
  static void moments(const WeightedEntries<A>& weighted, int64_t rows, A* out, const Tensor& values) {
    const Launcher launch("masked_mean", values);
    const Entries<A> in = entries_of(weighted, values.size(1));
    const Tensor scratch = new_parts<Moments>(values, in.parts > 1 ? rows * in.parts : 0);
    Moments* const partial = in.parts > 1 ? pointer<Moments>(scratch) : nullptr;
    launch(moments_kernel<A>, rows * in.parts, kBlock, in, rows, partial, out);
    if (partial) launch(finish_moments_kernel<A>, rows, kBlock, partial, in.parts, rows, out);
  }

  template <class A>
  static void whiten(const WeightedEntries<A>& weighted, const WhitenOptions& options, A* whitened, A* moments,
                     const Tensor& values) {
    const Launcher launch("masked_whiten", values);
    const Entries<A> in = entries_of(weighted, weighted.count);
    const Tensor scratch = new_parts<Moments>(values, in.parts);
    Moments* const partial = pointer<Moments>(scratch);
    launch(moments_kernel<A>, in.parts, kBlock, in, int64_t(1), partial, nullptr);
    // At least one block: the moments are written even if there are no entries.
    const int64_t blocks = std::max<int64_t>(1, writing_blocks(in.columns));
    launch(whiten_kernel<A>, blocks, kBlock, in, partial, options, whitened, moments);
  }

  template <class A>
  static void whiten_backward(const WeightedEntries<A>& weighted, const A* grad, const A* moments,
                              const WhitenOptions& options, A* out, const Tensor& values) {
    const Launcher launch("masked_whiten", values);
    const Entries<A> in = entries_of(weighted, weighted.count);
    const Tensor scratch = new_parts<GradSums>(values, in.parts);
    GradSums* const partial = pointer<GradSums>(scratch);
    launch(grad_sums_kernel<A>, in.columns == 0 ? 0 : in.parts, kBlock, in, grad, moments, options, partial);
    launch(whiten_backward_kernel<A>, writing_blocks(in.columns), kBlock, in, grad, moments, partial, options, out);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) {
  m.impl("_masked_moments", TORCH_BOX(&masked_moments<OnCUDA>));
  m.impl("_masked_whiten", TORCH_BOX(&masked_whiten<OnCUDA>));
  m.impl("_masked_whiten_backward", TORCH_BOX(&masked_whiten_backward<OnCUDA>));
}

}  // namespace ppo_ext
