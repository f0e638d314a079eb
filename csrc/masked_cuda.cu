// masked_cuda.cu
// Computes  see masked.h
// Bytes     moments 8 per entry in fp32; whitening 20 (it reads the entries again); backward 32
// Launch    blocks of 256 threads: parts of the sums, then one kernel that merges them and writes; moments of rows that one
//           block can hold take one kernel
// Sums      Chan's merge in fp64, in an order that depends on the number of entries only
// Limits    none

#include "common/launch.h"
#include "common/reduce.cuh"
#include "masked.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kEntriesPerPart = 4096;
constexpr int64_t kMaxParts = kBlock;  // so that one block merges them, one each thread

template <class A>
struct Entries {
  const A *values, *weights;
  int64_t columns;
  int parts;  // blocks that share a row
};

struct GradSums {
  double grad, centred;
};

inline int parts_of(int64_t columns) {
  return int(std::max<int64_t>(1, std::min(kMaxParts, divide_up(columns, kEntriesPerPart))));
}

// ---- device helpers ----

__device__ __forceinline__ Moments<double> merge_block(const Moments<double>& m) {
  return reduce_group<kBlock>(m,
                              [](const Moments<double>& a, const Moments<double>& b) { return moments_merge(a, b); });
}

__device__ __forceinline__ GradSums merge_block(const GradSums& s) {
  return reduce_group<kBlock>(
      s, [](const GradSums& a, const GradSums& b) { return GradSums{a.grad + b.grad, a.centred + b.centred}; });
}

// The merge of `count` parts, whole in thread 0.
template <class State>
__device__ __forceinline__ State merge_parts(const State* parts, int count) {
  return merge_block(int(threadIdx.x) < count ? parts[threadIdx.x] : State{});
}

template <class A>
__device__ __forceinline__ void write_moments(const Moments<double>& m, A* out) {
  out[0] = A(m.weight);
  out[1] = A(m.mean);
  out[2] = A(biased_var(m));
}

// ---- kernels ----

// Block i sums part i % parts of row i / parts; a row of one part is finished at once.
template <class A>
__global__ void __launch_bounds__(kBlock)
    moments_kernel(const Entries<A> in, int64_t rows, Moments<double>* parts, A* moments) {
  for (int64_t i = blockIdx.x; i < rows * in.parts; i += gridDim.x) {
    const int64_t row = i / in.parts * in.columns;
    Moments<double> m{};
    for (int64_t c = i % in.parts * kBlock + threadIdx.x; c < in.columns; c += int64_t(in.parts) * kBlock) {
      const double w = in.weights[row + c], x = in.values[row + c];
      if (w != 0.0) m = moments_merge(m, Moments<double>{w, x, x - x});  // NaN where x is infinite
    }
    m = merge_block(m);
    if (threadIdx.x != 0) continue;
    parts ? void(parts[i] = m) : write_moments(m, moments + 3 * i);
  }
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    finish_moments_kernel(const Moments<double>* parts, int count, int64_t rows, A* moments) {
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const Moments<double> m = merge_parts(parts + r * count, count);
    if (threadIdx.x == 0) write_moments(m, moments + 3 * r);
  }
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    whiten_kernel(const Entries<A> in, const Moments<double>* parts, bool shift_mean, A* whitened, A* moments) {
  const Moments<double> m = share_first<kBlock>(merge_parts(parts, in.parts));
  if (blockIdx.x == 0 && threadIdx.x == 0) write_moments(m, moments);
  const double scale = whiten_scale(m.weight, biased_var(m));
  for (int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x; i < in.columns; i += int64_t(gridDim.x) * kBlock)
    whitened[i] = in.weights[i] == A(0) ? A(0) : A(whiten_one(double(in.values[i]), m.mean, scale, shift_mean));
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    grad_sums_kernel(const Entries<A> in, const A* grad, const A* moments, GradSums* parts) {
  const double mean = moments[1];
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
__global__ void __launch_bounds__(kBlock) whiten_backward_kernel(const Entries<A> in, const A* grad, const A* moments,
                                                                 const GradSums* parts, bool shift_mean, A* out) {
  const GradSums sums = share_first<kBlock>(merge_parts(parts, in.parts));
  const Moments<double> m{double(moments[0]), double(moments[1]), double(moments[2]) * double(moments[0])};
  const WhitenGrad all = whiten_grad_of(m, sums.grad, sums.centred, shift_mean);
  for (int64_t i = int64_t(blockIdx.x) * kBlock + threadIdx.x; i < in.columns; i += int64_t(gridDim.x) * kBlock) {
    const A w = in.weights[i];
    out[i] = w == A(0) ? A(0) : A(whiten_grad(double(grad[i]), double(in.values[i]), double(w), all));
  }
}

// ---- launchers ----

template <class A>
Entries<A> entries_of(const Tensor& values, const Tensor& weights, int64_t columns) {
  return {pointer<A>(values), pointer<A>(weights), columns, parts_of(columns)};
}

// Blocks of a kernel that writes one result per entry.
inline int64_t writing_blocks(int64_t entries) { return divide_up(entries, 4 * kBlock); }

// One State for each of `count` parts, uninitialised.
template <class State>
Tensor new_parts(const Tensor& like, int64_t count) {
  static_assert(sizeof(State) % sizeof(double) == 0, "made of doubles");
  return new_tensor(like, {count * int64_t(sizeof(State) / sizeof(double))}, ScalarType::Double);
}

template <class State>
State* part_pointer(const Tensor& parts) {
  return static_cast<State*>(parts.data_ptr());
}

// ---- entry points ----

Tensor masked_moments_cuda(Tensor values, Tensor weights) {
  check_weighted("masked_mean", values, weights);
  if (values.dim() != 2) reject("masked_mean", "values", "have the shape [R, C]", shape_text(values));
  const Launcher launch("masked_mean", values);
  const int64_t rows = values.size(0), parts = parts_of(values.size(1));
  Tensor out = new_tensor(values, {rows, 3}, values.scalar_type());
  const Tensor scratch = new_parts<Moments<double>>(values, parts > 1 ? rows * parts : 0);
  dispatch_floats(values.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    Moments<double>* const partial = parts > 1 ? part_pointer<Moments<double>>(scratch) : nullptr;
    launch(moments_kernel<A>, rows * parts, kBlock, entries_of<A>(values, weights, values.size(1)), rows, partial,
           pointer<A>(out));
    if (partial) launch(finish_moments_kernel<A>, rows, kBlock, partial, int(parts), rows, pointer<A>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> masked_whiten_cuda(Tensor values, Tensor weights, bool shift_mean) {
  check_weighted("masked_whiten", values, weights);
  const Launcher launch("masked_whiten", values);
  const int64_t n = values.numel(), parts = parts_of(n);
  Tensor whitened = new_token_tensor(values, values.dim(), values.scalar_type());
  Tensor moments = new_tensor(values, {3}, values.scalar_type());
  const Tensor scratch = new_parts<Moments<double>>(values, parts);
  dispatch_floats(values.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Entries<A> in = entries_of<A>(values, weights, n);
    Moments<double>* const partial = part_pointer<Moments<double>>(scratch);
    launch(moments_kernel<A>, parts, kBlock, in, int64_t(1), partial, nullptr);
    // One block even for no entries: the moments are still to be written.
    launch(whiten_kernel<A>, std::max<int64_t>(1, writing_blocks(n)), kBlock, in, partial, shift_mean,
           pointer<A>(whitened), pointer<A>(moments));
  });
  return {whitened, moments};
}

Tensor masked_whiten_backward_cuda(Tensor grad, Tensor values, Tensor weights, Tensor moments, bool shift_mean) {
  check_whiten_backward(grad, values, weights, moments);
  const Launcher launch("masked_whiten", values);
  const int64_t n = values.numel(), parts = parts_of(n);
  Tensor out = new_token_tensor(values, values.dim(), values.scalar_type());
  const Tensor scratch = new_parts<GradSums>(values, parts);
  dispatch_floats(values.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const Entries<A> in = entries_of<A>(values, weights, n);
    GradSums* const partial = part_pointer<GradSums>(scratch);
    const A *g = pointer<A>(grad), *m = pointer<A>(moments);
    launch(grad_sums_kernel<A>, n == 0 ? 0 : parts, kBlock, in, g, m, partial);
    launch(whiten_backward_kernel<A>, writing_blocks(n), kBlock, in, g, m, partial, shift_mean, pointer<A>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CUDA, m) {
  m.impl("_masked_moments", TORCH_BOX(&masked_moments_cuda));
  m.impl("_masked_whiten", TORCH_BOX(&masked_whiten_cuda));
  m.impl("_masked_whiten_backward", TORCH_BOX(&masked_whiten_backward_cuda));
}

}  // namespace ppo_ext
