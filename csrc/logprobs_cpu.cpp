// logprobs_cpu.cpp
// Computes  see logprobs.h
// Bytes     forward N*V*s + 16N, backward 2*N*V*s + 24N   (s = size of a logit; each logit once per pass, from memory)
// Launch    threads over rows, each row in blocks that stay in the first-level cache; strided rows through a buffer
// Sums      16 lanes in fp32 within a block, fp64 across blocks, in an order that depends on V only: same bits for any threads
// Limits    a label outside [0, V) on a counted row is an error; masked rows are not read

#include "checks.h"
#include "logprobs.h"
#include "parallel.h"
#include "simd.h"

namespace ppo_ext {
namespace {

constexpr int kBlock = 2048;
constexpr float kSlack = 8.0f;  // how far, in powers of 2, a logit may exceed the origin of the sums before they are redone

// ---- one row, fp32 arithmetic in powers of 2 ----

struct BlockSums {
  f32v sum, weighted, top;  // of 2^y, of 2^y y, and the largest x
};

template <bool WithEntropy>
PPO_INLINE void add_terms(f32v x, float origin, float scale, BlockSums& sums) {
  const f32v y = (x - origin) * scale;
  const f32v e = exp2_clamped(y);
  sums.top = max_ignoring_nan(sums.top, x);
  sums.sum += e;
  if (WithEntropy) sums.weighted += e * (y < kExp2Low ? splat(kExp2Low) : y);  // 0 * -inf would be NaN
}

// One block's sums relative to `origin`, with its largest logit as max.
template <bool WithEntropy, class T>
PPO_INLINE SoftmaxState<double> block_state(const T* x, int n, float origin, float scale) {
  BlockSums a{splat(0.0f), splat(0.0f), splat(-INFINITY)}, b = a;
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    add_terms<WithEntropy>(load(x + i), origin, scale, a);
    add_terms<WithEntropy>(load(x + i + kLanes), origin, scale, b);
  }
  for (; i < n; i += kLanes)
    add_terms<WithEntropy>(i + kLanes <= n ? load(x + i) : load_tail(x + i, n - i, -INFINITY), origin, scale, a);
  double weighted = WithEntropy ? sum_lanes(a.weighted + b.weighted) : 0.0;
  // 0 log 0 = 0: a sum that entries without probability could make alone is none.
  if (std::abs(weighted) < 126.0 * 0x1p-126 * (n + kLanes)) weighted = 0.0;
  return {max_lanes(max_ignoring_nan(a.top, b.top)), sum_lanes(a.sum + b.sum), kLn2 * weighted};
}

// The sums are taken relative to an origin near the largest logit so far, so that each logit is read once.
template <bool WithEntropy, class T>
PPO_INLINE SoftmaxState<double> row_state(const T* row, int64_t V, int64_t stride, float inv_temperature) {
  T buffer[kBlock];
  const float scale = inv_temperature * kLog2e;
  SoftmaxState<double> state = softmax_empty<double>();  // its max is the origin
  double max = -INFINITY;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int n = V - begin < kBlock ? int(V - begin) : kBlock;
    const T* x = contiguous_block(row, begin, n, stride, buffer);
    if (state.max == -INFINITY) state.max = block_max(x, n);
    const float origin = state.max == -INFINITY ? 0.0f : float(state.max);
    SoftmaxState<double> block = block_state<WithEntropy>(x, n, origin, scale);
    if (block.max > state.max && !((block.max - state.max) * scale <= kSlack)) {
      state = softmax_rescale(state, block.max, double(inv_temperature));
      block = block_state<WithEntropy>(x, n, float(block.max), scale);
    }
    if (state.max == -INFINITY && block.sum == block.sum) continue;  // nothing but -inf
    max = block.max > max ? block.max : max;
    state.sum += block.sum;
    state.weighted += block.weighted;
  }
  return max > -INFINITY ? softmax_rescale(state, max, double(inv_temperature)) : state;
}

// The row's numbers for the backward pass, in powers of 2: p = 2^((x - max) scale - log2_sum).
struct RowGrad {
  float max, scale, log2_sum, alpha, beta;
};

PPO_INLINE RowGrad row_grad_in_powers_of_two(float max, float log_sum, float inv_temperature, LogitGrad<float> row) {
  return {max, inv_temperature * kLog2e, log_sum * kLog2e, row.alpha, row.beta * float(kLn2)};
}

template <bool WithEntropy>
PPO_INLINE f32v grad_terms(f32v x, const RowGrad& row) {
  const f32v log2_p = (x - row.max) * row.scale - row.log2_sum;
  const f32v p = exp2_or_zero(log2_p);
  if (!WithEntropy) return p * row.alpha;
  return p * (row.alpha - row.beta * (log2_p < -1e4f ? splat(-1e4f) : log2_p));
}

template <bool WithEntropy, class T>
PPO_INLINE void row_grad(const T* row, int64_t stride, T* out, int64_t out_stride, int64_t V, float max, float log_sum,
                         float inv_temperature, LogitGrad<float> coefficients) {
  const RowGrad grad = row_grad_in_powers_of_two(max, log_sum, inv_temperature, coefficients);
  T in_buffer[kBlock], out_buffer[kBlock];
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int n = V - begin < kBlock ? int(V - begin) : kBlock;
    const T* x = contiguous_block(row, begin, n, stride, in_buffer);
    T* y = out_stride == 1 ? out + begin : out_buffer;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, grad_terms<WithEntropy>(load(x + i), grad));
    if (i < n) store_tail(y + i, grad_terms<WithEntropy>(load_tail(x + i, n - i, 0.0f), grad), n - i);
    if (out_stride != 1)
      for (int j = 0; j < n; ++j) out[(begin + j) * out_stride] = out_buffer[j];
  }
}

// ---- one row, fp64 arithmetic ----

template <bool WithEntropy>
SoftmaxState<double> row_state(const double* row, int64_t V, int64_t stride, double inv_temperature) {
  SoftmaxState<double> state = softmax_empty<double>();
  for (int64_t v = 0; v < V; ++v) state.max = row[v * stride] > state.max ? row[v * stride] : state.max;
  const double origin = state.max == -INFINITY ? 0.0 : state.max;
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    double sum = 0, weighted = 0;  // per block, so that rounding grows with the block and not with V
    for (int64_t v = begin; v < begin + kBlock && v < V; ++v) {
      const double y = (row[v * stride] - origin) * inv_temperature, e = std::exp(y);
      sum += e;
      if (WithEntropy) weighted += e * softmax_bounded(y);
    }
    state.sum += sum;
    state.weighted += weighted;
  }
  return state;
}

template <bool WithEntropy>
void row_grad(const double* row, int64_t stride, double* out, int64_t out_stride, int64_t V, double max, double log_sum,
              double inv_temperature, LogitGrad<double> coefficients) {
  for (int64_t v = 0; v < V; ++v) {
    const double log_p = token_logprob(row[v * stride], max, log_sum, inv_temperature);
    out[v * out_stride] = std::exp(log_p) * (coefficients.alpha - coefficients.beta * softmax_bounded(log_p));
  }
}

// ---- ranges of rows ----

template <class A>
struct RowStats {
  A *logprobs, *entropy, *max, *log_sum;
};

template <class T, class A>
struct Forward {
  const T* logits;
  LogitRows rows;
  const int64_t* labels;
  const bool* mask;
  A inv_temperature;
  RowStats<A> out;
};

template <bool WithEntropy, class T, class A>
PPO_INLINE void forward_rows(const Forward<T, A>& job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    SoftmaxState<double> state{};
    A logprob = 0, entropy = 0, log_sum = 0;
    if (!job.mask || job.mask[n]) {
      const T* row = job.logits + job.rows.offset(n);
      state = row_state<WithEntropy>(row, job.rows.V, job.rows.stride_v, job.inv_temperature);
      const double exact_log_sum = softmax_log_sum(state.sum), inv_temperature = job.inv_temperature;
      log_sum = A(exact_log_sum);
      logprob = A(token_logprob(double(row[job.labels[n] * job.rows.stride_v]), state.max, exact_log_sum, inv_temperature));
      if (WithEntropy) entropy = A(row_entropy(state.sum, exact_log_sum, state.weighted));
    }
    job.out.logprobs[n] = logprob;
    if (WithEntropy) job.out.entropy[n] = entropy;
    job.out.max[n] = A(state.max);
    job.out.log_sum[n] = log_sum;
  }
}

template <class T, class A>
struct Backward {
  const T* logits;
  LogitRows rows;
  T* grad;
  LogitRows grad_rows;
  const int64_t* labels;
  const bool* mask;
  const A *grad_logprobs, *grad_entropy;  // either may be null
  RowStats<const A> saved;
  A inv_temperature;
};

template <bool WithEntropy, class T, class A>
PPO_INLINE void backward_rows(const Backward<T, A>& job, int64_t begin, int64_t end) {
  const int64_t V = job.rows.V;
  for (int64_t n = begin; n < end; ++n) {
    const T* row = job.logits + job.rows.offset(n);
    T* out = job.grad + job.grad_rows.offset(n);
    const int64_t stride = job.grad_rows.stride_v;
    if (job.mask && !job.mask[n]) {
      for (int64_t v = 0; v < V; ++v) out[v * stride] = T(0);
      continue;
    }
    const A g = job.grad_logprobs ? job.grad_logprobs[n] : A(0);
    const A h = WithEntropy ? job.grad_entropy[n] : A(0), entropy = WithEntropy ? job.saved.entropy[n] : A(0);
    const A max = job.saved.max[n], log_sum = job.saved.log_sum[n];
    // Read before the row is overwritten, as the gradient may go there.
    const A logprob = token_logprob(A(row[job.labels[n] * job.rows.stride_v]), max, log_sum, job.inv_temperature);
    row_grad<WithEntropy>(row, job.rows.stride_v, out, stride, V, max, log_sum, job.inv_temperature,
                          logit_grad_of_row(g, h, entropy, job.inv_temperature));
    out[job.labels[n] * stride] = T(token_logit_grad(logprob, g, h, entropy, job.inv_temperature));
  }
}

#define PPO_DEFINE_ROWS(T, A)                                                                                          \
  PPO_CLONES void forward_range(const Forward<T, A>& job, int64_t begin, int64_t end) {                                \
    job.out.entropy ? forward_rows<true>(job, begin, end) : forward_rows<false>(job, begin, end);                      \
  }                                                                                                                    \
  PPO_CLONES void backward_range(const Backward<T, A>& job, int64_t begin, int64_t end) {                              \
    job.grad_entropy ? backward_rows<true>(job, begin, end) : backward_rows<false>(job, begin, end);                   \
  }
PPO_DEFINE_ROWS(float, float)
PPO_DEFINE_ROWS(BFloat16, float)
PPO_DEFINE_ROWS(Half, float)
PPO_DEFINE_ROWS(double, double)

// ---- entry points ----

void check_labels(const Tensor& labels, const bool* mask, int64_t V) {
  const int64_t* ids = pointer<int64_t>(labels);
  for (int64_t n = 0; n < labels.numel(); ++n) {
    if ((mask && !mask[n]) || (ids[n] >= 0 && ids[n] < V)) continue;
    std::string position;
    int64_t rest = n;
    for (int64_t d = labels.dim() - 1; d >= 0; --d) {
      position = std::to_string(rest % labels.size(d)) + (position.empty() ? "" : ", ") + position;
      rest /= labels.size(d);
    }
    reject("logprobs", "labels[" + position + "]", "be an id in [0, " + std::to_string(V) + ")", ids[n]);
  }
}

template <class T, class A>
void forward(const Tensor& logits, const LogitRows& rows, const Tensor& labels, const bool* mask, double temperature,
             const RowStats<A>& out) {
  const Forward<T, A> job{pointer<T>(logits), rows, pointer<int64_t>(labels), mask, A(1.0 / temperature), out};
  parallel_rows(rows.rows, rows.V, [&](int64_t begin, int64_t end) { forward_range(job, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logprobs_cpu(Tensor logits, Tensor labels, std::optional<Tensor> mask,
                                                        double temperature, bool with_entropy) {
  check_logprobs(logits, labels, mask, temperature);
  const LogitRows rows = logit_rows("logprobs", "logits", logits);
  check_labels(labels, mask_pointer(mask), rows.V);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  Tensor logprobs = new_token_tensor(labels, labels.dim(), dtype), max = new_token_tensor(labels, labels.dim(), dtype),
         log_sum = new_token_tensor(labels, labels.dim(), dtype),
         entropy = with_entropy ? new_token_tensor(labels, labels.dim(), dtype) : new_tensor(labels, {0}, dtype);
  const auto stats = [&](auto zero) {
    using A = decltype(zero);
    return RowStats<A>{pointer<A>(logprobs), with_entropy ? pointer<A>(entropy) : nullptr, pointer<A>(max), pointer<A>(log_sum)};
  };
  switch (logits.scalar_type()) {
    case ScalarType::Float: forward<float, float>(logits, rows, labels, mask_pointer(mask), temperature, stats(0.0f)); break;
    case ScalarType::BFloat16: forward<BFloat16, float>(logits, rows, labels, mask_pointer(mask), temperature, stats(0.0f)); break;
    case ScalarType::Half: forward<Half, float>(logits, rows, labels, mask_pointer(mask), temperature, stats(0.0f)); break;
    case ScalarType::Double: forward<double, double>(logits, rows, labels, mask_pointer(mask), temperature, stats(0.0)); break;
    default: reject_dtype("logprobs", "logits", logits.scalar_type());
  }
  return {logprobs, entropy, max, log_sum};
}

struct BackwardInput {
  const std::optional<Tensor>&grad_logprobs, &grad_entropy;
  const Tensor& labels;
  const std::optional<Tensor>& mask;
  const Tensor &entropy, &max, &log_sum;
  double temperature;
};

template <class T, class A>
void backward(const Tensor& logits, const LogitRows& rows, const Tensor& grad, const LogitRows& grad_rows, const BackwardInput& in) {
  const Backward<T, A> job{
      pointer<T>(logits), rows, pointer<T>(grad), grad_rows, pointer<int64_t>(in.labels), mask_pointer(in.mask),
      in.grad_logprobs ? pointer<A>(*in.grad_logprobs) : nullptr, in.grad_entropy ? pointer<A>(*in.grad_entropy) : nullptr,
      {nullptr, in.grad_entropy ? pointer<A>(in.entropy) : nullptr, pointer<A>(in.max), pointer<A>(in.log_sum)},
      A(1.0 / in.temperature)};
  parallel_rows(rows.rows, rows.V, [&](int64_t begin, int64_t end) { backward_range(job, begin, end); });
}

void run_backward(const Tensor& logits, const Tensor& grad, const BackwardInput& in) {
  check_logprobs(logits, in.labels, in.mask, in.temperature);
  check_row_stats("logprobs", logits, {{"row_max", in.max}, {"log_sum", in.log_sum}});
  if (in.grad_logprobs) check_row_stats("logprobs", logits, {{"grad_logprobs", *in.grad_logprobs}});
  if (in.grad_entropy) check_row_stats("logprobs", logits, {{"grad_entropy", *in.grad_entropy}, {"entropy", in.entropy}});
  const LogitRows rows = logit_rows("logprobs", "logits", logits), grad_rows = logit_rows("logprobs", "grad", grad);
  check_labels(in.labels, mask_pointer(in.mask), rows.V);
  switch (logits.scalar_type()) {
    case ScalarType::Float: return backward<float, float>(logits, rows, grad, grad_rows, in);
    case ScalarType::BFloat16: return backward<BFloat16, float>(logits, rows, grad, grad_rows, in);
    case ScalarType::Half: return backward<Half, float>(logits, rows, grad, grad_rows, in);
    case ScalarType::Double: return backward<double, double>(logits, rows, grad, grad_rows, in);
    default: reject_dtype("logprobs", "logits", logits.scalar_type());
  }
}

Tensor logprobs_backward_cpu(Tensor logits, std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy,
                             Tensor labels, std::optional<Tensor> mask, Tensor entropy, Tensor max, Tensor log_sum,
                             double temperature) {
  Tensor grad = new_token_tensor(logits, logits.dim(), logits.scalar_type());
  run_backward(logits, grad, {grad_logprobs, grad_entropy, labels, mask, entropy, max, log_sum, temperature});
  return grad;
}

void logprobs_backward_inplace_cpu(Tensor logits, std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy,
                                   Tensor labels, std::optional<Tensor> mask, Tensor entropy, Tensor max, Tensor log_sum,
                                   double temperature) {
  require_no_overlap("logprobs", "logits", logits);
  run_backward(logits, logits, {grad_logprobs, grad_entropy, labels, mask, entropy, max, log_sum, temperature});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_logprobs", TORCH_BOX(&logprobs_cpu));
  m.impl("_logprobs_backward", TORCH_BOX(&logprobs_backward_cpu));
  m.impl("_logprobs_backward_", TORCH_BOX(&logprobs_backward_inplace_cpu));
}

}  // namespace ppo_ext
