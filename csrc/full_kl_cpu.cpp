// full_kl_cpu.cpp
// Computes  see full_kl.h
// Bytes     forward 2*N*V*s + 20N, backward 3*N*V*s + 24N   (s = size of a logit; each logit once per pass, from memory)
// Launch    threads over rows, each row in blocks that stay in the first-level cache; strided rows through a buffer
// Sums      16 lanes in fp32 within a block, fp64 across blocks, in an order that depends on V only: same bits for any threads
// Limits    masked rows are not read

#include "checks.h"
#include "full_kl.h"
#include "parallel.h"
#include "simd.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 2048;
// How far, in powers of 2, a logit may exceed its origin before the block is redone: the divergence is a small difference,
// and what the origins are off by adds to the terms of it.
constexpr float kSlack = 0.5f;

// ---- one row, fp32 arithmetic in powers of 2 ----

// The policy's and the reference's origins; what they multiply their distances with is the same.
struct Origins {
  float policy, ref, scale;
};

struct BlockSums {
  f32v sum, ref_sum, weighted, top, ref_top;  // as in KLState, in powers of 2
};

PPO_INLINE void add_terms(f32v x, f32v ref_x, const Origins& origin, BlockSums& sums) {
  const f32v y = (x - origin.policy) * origin.scale;
  const f32v e = exp2_clamped(y);
  sums.top = max_ignoring_nan(sums.top, x);
  sums.ref_top = max_ignoring_nan(sums.ref_top, ref_x);
  sums.sum += e;
  sums.ref_sum += exp2_clamped((ref_x - origin.ref) * origin.scale);
  // y - y' from x - x', which loses nothing where the two are close. Where the policy has no probability the term is 0,
  // even against a -inf of the reference; a NaN stays.
  const f32v gap = ((x - ref_x) - (origin.policy - origin.ref)) * origin.scale;
  sums.weighted += y < kExp2Low ? splat(0.0f) : e * gap;
}

template <class T>
PPO_INLINE KLState<double> block_state(const T* x, const T* ref_x, int n, const Origins& origin) {
  const f32v zero = splat(0.0f), lowest = splat(-INFINITY);
  BlockSums sums{zero, zero, zero, lowest, lowest};
  for (int i = 0; i < n; i += kLanes) {
    const bool whole = i + kLanes <= n;
    add_terms(whole ? load(x + i) : load_tail(x + i, n - i, -INFINITY),
              whole ? load(ref_x + i) : load_tail(ref_x + i, n - i, -INFINITY), origin, sums);
  }
  return {max_lanes(sums.top), sum_lanes(sums.sum), max_lanes(sums.ref_top), sum_lanes(sums.ref_sum), kLn2 * sum_lanes(sums.weighted)};
}

PPO_INLINE bool exceeds(double top, double origin, float scale) { return top > origin && !((top - origin) * scale <= kSlack); }

// The sums are taken relative to origins near the largest logits so far, so that each logit is read once.
template <class T>
PPO_INLINE KLState<double> row_state(const T* row, int64_t stride, const T* ref_row, int64_t ref_stride, int64_t V,
                                     float inv_temperature) {
  T buffer[kBlock], ref_buffer[kBlock];
  const float scale = inv_temperature * kLog2e;
  KLState<double> state = kl_empty<double>();  // its maxima are the origins
  double max = -INFINITY, ref_max = -INFINITY;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int n = V - begin < kBlock ? int(V - begin) : kBlock;
    const T* x = contiguous_block(row, begin, n, stride, buffer);
    const T* ref_x = contiguous_block(ref_row, begin, n, ref_stride, ref_buffer);
    if (state.max == -INFINITY) state.max = block_max(x, n);
    if (state.ref_max == -INFINITY) state.ref_max = block_max(ref_x, n);
    const auto read_block = [&] {
      return block_state(x, ref_x, n, {state.max == -INFINITY ? 0.0f : float(state.max),
                                       state.ref_max == -INFINITY ? 0.0f : float(state.ref_max), scale});
    };
    KLState<double> block = read_block();
    const bool moves = exceeds(block.max, state.max, scale), ref_moves = exceeds(block.ref_max, state.ref_max, scale);
    if (moves || ref_moves) {
      state = kl_rescale(state, moves ? block.max : state.max, ref_moves ? block.ref_max : state.ref_max, double(inv_temperature));
      block = read_block();
    }
    max = block.max > max ? block.max : max;
    ref_max = block.ref_max > ref_max ? block.ref_max : ref_max;
    // A block of nothing but -inf has no sum; a NaN in it stays.
    if (max > -INFINITY || block.sum != block.sum) state.sum += block.sum;
    if (ref_max > -INFINITY || block.ref_sum != block.ref_sum) state.ref_sum += block.ref_sum;
    state.weighted += block.weighted;
  }
  return kl_rescale(state, max > -INFINITY ? max : state.max, ref_max > -INFINITY ? ref_max : state.ref_max, double(inv_temperature));
}

template <class A>
struct RowStats {
  A *kl, *max, *log_sum, *ref_max, *ref_log_sum;
};

template <class A>
struct Row {
  A max, log_sum, ref_max, ref_log_sum, kl, grad_over_temperature, inv_temperature;
};

PPO_INLINE f32v grad_terms(f32v x, f32v ref_x, const Row<float>& r) {
  const f32v log_p = (x - r.max) * r.inv_temperature - r.log_sum;
  const f32v log_q = (ref_x - r.ref_max) * r.inv_temperature - r.ref_log_sum;
  const f32v p = exp2_or_zero(log_p * kLog2e);
  return p == 0.0f ? splat(0.0f) : r.grad_over_temperature * p * ((log_p - log_q) - r.kl);
}

template <class T>
PPO_INLINE void row_grad(const T* row, int64_t stride, const T* ref_row, int64_t ref_stride, T* out, int64_t out_stride,
                         int64_t V, const Row<float>& r) {
  T buffer[kBlock], ref_buffer[kBlock], out_buffer[kBlock];
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int n = V - begin < kBlock ? int(V - begin) : kBlock;
    const T* x = contiguous_block(row, begin, n, stride, buffer);
    const T* ref_x = contiguous_block(ref_row, begin, n, ref_stride, ref_buffer);
    T* y = out_stride == 1 ? out + begin : out_buffer;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, grad_terms(load(x + i), load(ref_x + i), r));
    if (i < n)
      store_tail(y + i, grad_terms(load_tail(x + i, n - i, 0.0f), load_tail(ref_x + i, n - i, 0.0f), r), n - i);
    if (out_stride != 1)
      for (int j = 0; j < n; ++j) out[(begin + j) * out_stride] = out_buffer[j];
  }
}

// ---- one row, fp64 arithmetic ----

KLState<double> row_state(const double* row, int64_t stride, const double* ref_row, int64_t ref_stride, int64_t V,
                          double inv_temperature) {
  KLState<double> state = kl_empty<double>();
  for (int64_t v = 0; v < V; ++v) {
    state.max = row[v * stride] > state.max ? row[v * stride] : state.max;
    state.ref_max = ref_row[v * ref_stride] > state.ref_max ? ref_row[v * ref_stride] : state.ref_max;
  }
  const double origin = state.max == -INFINITY ? 0.0 : state.max, ref_origin = state.ref_max == -INFINITY ? 0.0 : state.ref_max;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    double sum = 0, ref_sum = 0, weighted = 0;  // per block, so that rounding grows with the block and not with V
    for (int64_t v = begin; v < begin + kBlock && v < V; ++v) {
      const double y = (row[v * stride] - origin) * inv_temperature, ref_y = (ref_row[v * ref_stride] - ref_origin) * inv_temperature;
      const double e = std::exp(y);
      sum += e;
      ref_sum += std::exp(ref_y);
      weighted += e == 0.0 ? 0.0 : e * (y - ref_y);
    }
    state.sum += sum;
    state.ref_sum += ref_sum;
    state.weighted += weighted;
  }
  return state;
}

void row_grad(const double* row, int64_t stride, const double* ref_row, int64_t ref_stride, double* out, int64_t out_stride,
              int64_t V, const Row<double>& r) {
  for (int64_t v = 0; v < V; ++v) {
    const double log_p = token_logprob(row[v * stride], r.max, r.log_sum, r.inv_temperature);
    const double log_q = token_logprob(ref_row[v * ref_stride], r.ref_max, r.ref_log_sum, r.inv_temperature);
    const double p = std::exp(log_p);
    out[v * out_stride] = p == 0.0 ? 0.0 : kl_logit_grad(p, log_p, log_q, r.kl, r.grad_over_temperature);
  }
}

// ---- ranges of rows ----

template <class T, class A>
struct Job {
  const T *logits, *ref_logits;
  LogitRows rows, ref_rows;
  const bool* mask;
  A inv_temperature;
  RowStats<A> stats;  // written forward, read backward
  const A* grad_kl;   // backward only, and so are the next two
  T* grad;
  LogitRows grad_rows;
};

template <class T, class A>
PPO_INLINE void forward_rows(const Job<T, A>& job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    KLState<double> state{};
    A kl = 0, log_sum = 0, ref_log_sum = 0;
    if (!job.mask || job.mask[n]) {
      state = row_state(job.logits + job.rows.offset(n), job.rows.stride_v, job.ref_logits + job.ref_rows.offset(n),
                        job.ref_rows.stride_v, job.rows.V, job.inv_temperature);
      log_sum = A(softmax_log_sum(state.sum));
      ref_log_sum = A(softmax_log_sum(state.ref_sum));
      kl = A(row_kl(state));
    }
    job.stats.kl[n] = kl;
    job.stats.max[n] = A(state.max);
    job.stats.log_sum[n] = log_sum;
    job.stats.ref_max[n] = A(state.ref_max);
    job.stats.ref_log_sum[n] = ref_log_sum;
  }
}

template <class T, class A>
PPO_INLINE void backward_rows(const Job<T, A>& job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    T* out = job.grad + job.grad_rows.offset(n);
    if (job.mask && !job.mask[n]) {
      for (int64_t v = 0; v < job.rows.V; ++v) out[v * job.grad_rows.stride_v] = T(0);
      continue;
    }
    const Row<A> row{job.stats.max[n],         job.stats.log_sum[n], job.stats.ref_max[n],
                     job.stats.ref_log_sum[n], job.stats.kl[n],      job.grad_kl[n] * job.inv_temperature,
                     job.inv_temperature};
    row_grad(job.logits + job.rows.offset(n), job.rows.stride_v, job.ref_logits + job.ref_rows.offset(n), job.ref_rows.stride_v,
             out, job.grad_rows.stride_v, job.rows.V, row);
  }
}

#define PPO_DEFINE_ROWS(T, A)                                                                                         \
  PPO_CLONES void forward_range(const Job<T, A>& job, int64_t begin, int64_t end) { forward_rows(job, begin, end); }   \
  PPO_CLONES void backward_range(const Job<T, A>& job, int64_t begin, int64_t end) { backward_rows(job, begin, end); }
PPO_DEFINE_ROWS(float, float)
PPO_DEFINE_ROWS(BFloat16, float)
PPO_DEFINE_ROWS(Half, float)
PPO_DEFINE_ROWS(double, double)

// ---- entry points ----

struct Arguments {
  const Tensor &logits, &ref_logits;
  const std::optional<Tensor>& mask;
  double temperature;
  const Tensor &kl, &max, &log_sum, &ref_max, &ref_log_sum;
  const Tensor *grad_kl, *grad;  // null for the forward pass
};

template <class T, class A>
void run(const Arguments& in) {
  Job<T, A> job{pointer<T>(in.logits),
                pointer<T>(in.ref_logits),
                logit_rows("full_kl", "logits", in.logits),
                logit_rows("full_kl", "ref_logits", in.ref_logits),
                mask_pointer(in.mask),
                A(1.0 / in.temperature),
                {pointer<A>(in.kl), pointer<A>(in.max), pointer<A>(in.log_sum), pointer<A>(in.ref_max), pointer<A>(in.ref_log_sum)},
                nullptr,
                nullptr,
                {}};
  if (!in.grad) {
    parallel_rows(job.rows.rows, 2 * job.rows.V, [&](int64_t begin, int64_t end) { forward_range(job, begin, end); });
    return;
  }
  job.grad_kl = pointer<A>(*in.grad_kl);
  job.grad = pointer<T>(*in.grad);
  job.grad_rows = logit_rows("full_kl", "grad", *in.grad);
  parallel_rows(job.rows.rows, 2 * job.rows.V, [&](int64_t begin, int64_t end) { backward_range(job, begin, end); });
}

void dispatch(const Arguments& in) {
  switch (in.logits.scalar_type()) {
    case ScalarType::Float: return run<float, float>(in);
    case ScalarType::BFloat16: return run<BFloat16, float>(in);
    case ScalarType::Half: return run<Half, float>(in);
    case ScalarType::Double: return run<double, double>(in);
    default: reject_dtype("full_kl", "logits", in.logits.scalar_type());
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> full_kl_cpu(Tensor logits, Tensor ref_logits, std::optional<Tensor> mask,
                                                               double temperature) {
  check_full_kl(logits, ref_logits, mask, temperature);
  const auto row = [&] { return new_token_tensor(logits, logits.dim() - 1, accumulate_dtype(logits.scalar_type())); };
  Tensor kl = row(), max = row(), log_sum = row(), ref_max = row(), ref_log_sum = row();
  dispatch({logits, ref_logits, mask, temperature, kl, max, log_sum, ref_max, ref_log_sum, nullptr, nullptr});
  return {kl, max, log_sum, ref_max, ref_log_sum};
}

void run_backward(const Tensor& grad, const Arguments& in) {
  check_full_kl(in.logits, in.ref_logits, in.mask, in.temperature);
  check_row_stats("full_kl", in.logits,
                  {{"grad_kl", *in.grad_kl}, {"kl", in.kl}, {"row_max", in.max}, {"log_sum", in.log_sum},
                   {"ref_row_max", in.ref_max}, {"ref_log_sum", in.ref_log_sum}});
  Arguments with_grad = in;
  with_grad.grad = &grad;
  dispatch(with_grad);
}

Tensor full_kl_backward_cpu(Tensor logits, Tensor ref_logits, Tensor grad_kl, std::optional<Tensor> mask, Tensor kl, Tensor max,
                            Tensor log_sum, Tensor ref_max, Tensor ref_log_sum, double temperature) {
  Tensor grad = new_token_tensor(logits, logits.dim(), logits.scalar_type());
  run_backward(grad, {logits, ref_logits, mask, temperature, kl, max, log_sum, ref_max, ref_log_sum, &grad_kl, nullptr});
  return grad;
}

void full_kl_backward_inplace_cpu(Tensor logits, Tensor ref_logits, Tensor grad_kl, std::optional<Tensor> mask, Tensor kl,
                                  Tensor max, Tensor log_sum, Tensor ref_max, Tensor ref_log_sum, double temperature) {
  require_no_overlap("full_kl", "logits", logits);
  run_backward(logits, {logits, ref_logits, mask, temperature, kl, max, log_sum, ref_max, ref_log_sum, &grad_kl, nullptr});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_full_kl", TORCH_BOX(&full_kl_cpu));
  m.impl("_full_kl_backward", TORCH_BOX(&full_kl_backward_cpu));
  m.impl("_full_kl_backward_", TORCH_BOX(&full_kl_backward_inplace_cpu));
}

}  // namespace ppo_ext
