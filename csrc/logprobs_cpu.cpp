// logprobs_cpu.cpp
// Computes  see logprobs.h
// Bytes     forward N*V*s + 16N, backward 2*N*V*s + 24N   (s = size of a logit; each logit once per pass, from memory)
// Launch    threads over rows, each row in blocks that stay in the first-level cache; strided rows through a buffer
// Sums      some vectors in fp32, the rest in fp64, in an order that depends on V only: same bits for any threads
// Limits    a label outside [0, V) on a counted row is an error; masked rows are not read

#include "common/checks.h"
#include "common/pages.h"
#include "common/parallel.h"
#include "logprobs_simd.h"

namespace ppo_ext {
namespace {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

constexpr int64_t kBlock = 2048;  // of fp64 logits

// ---- one row, fp64 arithmetic ----

SoftmaxState<double> row_state(const LogitRow<double>& row, double inv_temperature, bool with_entropy) {
  SoftmaxState<double> state = softmax_empty<double>();
  const auto logit = [&](int64_t v) { return row.logits[v * row.stride]; };
  for (int64_t v = 0; v < row.V; ++v) state.max = logit(v) > state.max ? logit(v) : state.max;
  const double origin = state.max == -INFINITY ? 0.0 : state.max;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    double sum = 0, weighted = 0;  // per block, so that rounding grows with the block and not with V
    for (int64_t v = begin; v < std::min(begin + kBlock, row.V); ++v) {
      const double y = (logit(v) - origin) * inv_temperature, e = std::exp(y);
      sum += e;
      if (with_entropy) weighted += e * softmax_bounded(y);
    }
    state.sum += sum;
    state.weighted += weighted;
  }
  return state;
}

void fill_gradient(const LogitRow<double>& row, const LogitGrad<double>& grad, double max, double log_sum,
                   double inv_temperature, double* out, int64_t out_stride) {
  for (int64_t v = 0; v < row.V; ++v) {
    const double log_p = token_logprob(row.logits[v * row.stride], max, log_sum, inv_temperature);
    out[v * out_stride] = std::exp(log_p) * (grad.alpha - grad.beta * softmax_bounded(log_p));
  }
}

// ---- one row, fp32 arithmetic ----

template <class T>
SoftmaxState<double> row_state(const LogitRow<T>& row, float inv_temperature, bool with_entropy) {
  return PPO_AT_LEVEL(row_state, row, inv_temperature, with_entropy);
}

// p (alpha - beta log p) in terms of the distance to the largest logit.
template <class T>
void fill_gradient(const LogitRow<T>& row, const LogitGrad<float>& grad, float max, float log_sum,
                   float inv_temperature, T* out, int64_t out_stride) {
  const double share = std::exp(-double(log_sum)), at_zero = share * (grad.alpha + double(grad.beta) * log_sum);
  const RowGrad from_max{max, inv_temperature * float(kLog2E), float(at_zero),
                         float(share * grad.beta * inv_temperature)};
  PPO_AT_LEVEL(fill_gradient, row, from_max, out, out_stride);
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

  LogitRow<T> row(int64_t n) const { return {logits + rows.offset(n), rows.stride_v, rows.V}; }
};

template <class T, class A>
void forward_rows(const Forward<T, A>& job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    SoftmaxState<double> state{};
    double logprob = 0, entropy = 0, log_sum = 0;
    if (!job.mask || job.mask[n]) {
      const LogitRow<T> row = job.row(n);
      state = row_state(row, job.inv_temperature, job.out.entropy);
      log_sum = softmax_log_sum(state.sum);
      logprob = token_logprob(double(row.logits[job.labels[n] * row.stride]), state.max, log_sum,
                              double(job.inv_temperature));
      entropy = row_entropy(state.sum, log_sum, state.weighted);
    }
    job.out.logprobs[n] = A(logprob);
    if (job.out.entropy) job.out.entropy[n] = A(entropy);
    job.out.max[n] = A(state.max);
    job.out.log_sum[n] = A(log_sum);
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

  LogitRow<T> row(int64_t n) const { return {logits + rows.offset(n), rows.stride_v, rows.V}; }
};

template <class T, class A>
void backward_rows(const Backward<T, A>& job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const LogitRow<T> row = job.row(n);
    T* out = job.grad + job.grad_rows.offset(n);
    const int64_t stride = job.grad_rows.stride_v;
    if (job.mask && !job.mask[n]) {
      for (int64_t v = 0; v < row.V; ++v) out[v * stride] = T(0);
      continue;
    }
    const A g = job.grad_logprobs ? job.grad_logprobs[n] : A(0), h = job.grad_entropy ? job.grad_entropy[n] : A(0);
    const A entropy = job.grad_entropy ? job.saved.entropy[n] : A(0), max = job.saved.max[n],
            log_sum = job.saved.log_sum[n];
    // Read before the row is overwritten, as the gradient may go there.
    const A logprob = token_logprob(A(row.logits[job.labels[n] * row.stride]), max, log_sum, job.inv_temperature);
    fill_gradient(row, logit_grad_of_row(g, h, entropy, job.inv_temperature), max, log_sum, job.inv_temperature, out,
                  stride);
    out[job.labels[n] * stride] = T(token_logit_grad(logprob, g, h, entropy, job.inv_temperature));
  }
}

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
  parallel_rows(rows.rows, rows.V, [&](int64_t begin, int64_t end) { forward_rows(job, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logprobs_cpu(Tensor logits, Tensor labels, std::optional<Tensor> mask,
                                                        double temperature, bool with_entropy,
                                                        std::optional<Tensor> label_note) {
  check_logprobs(logits, labels, mask, temperature);
  if (label_note) check_label_note(*label_note, logits);  // nothing to note: a bad label is refused below
  const LogitRows rows = logit_rows("logprobs", "logits", logits);
  check_labels(labels, mask_pointer(mask), rows.V);
  const ScalarType dtype = accumulate_dtype(logits.scalar_type());
  Tensor logprobs = new_token_tensor(labels, labels.dim(), dtype), max = new_token_tensor(labels, labels.dim(), dtype),
         log_sum = new_token_tensor(labels, labels.dim(), dtype),
         entropy = with_entropy ? new_token_tensor(labels, labels.dim(), dtype) : new_tensor(labels, {0}, dtype);
  const auto stats = [&](auto zero) {
    using A = decltype(zero);
    return RowStats<A>{pointer<A>(logprobs), with_entropy ? pointer<A>(entropy) : nullptr, pointer<A>(max),
                       pointer<A>(log_sum)};
  };
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      forward<float, float>(logits, rows, labels, mask_pointer(mask), temperature, stats(0.0f));
      break;
    case ScalarType::BFloat16:
      forward<BFloat16, float>(logits, rows, labels, mask_pointer(mask), temperature, stats(0.0f));
      break;
    case ScalarType::Half:
      forward<Half, float>(logits, rows, labels, mask_pointer(mask), temperature, stats(0.0f));
      break;
    case ScalarType::Double:
      forward<double, double>(logits, rows, labels, mask_pointer(mask), temperature, stats(0.0));
      break;
    default:
      reject_dtype("logprobs", "logits", logits.scalar_type());
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
void backward(const Tensor& logits, const LogitRows& rows, const Tensor& grad, const LogitRows& grad_rows,
              const BackwardInput& in) {
  const Backward<T, A> job{
      pointer<T>(logits),
      rows,
      pointer<T>(grad),
      grad_rows,
      pointer<int64_t>(in.labels),
      mask_pointer(in.mask),
      in.grad_logprobs ? pointer<A>(*in.grad_logprobs) : nullptr,
      in.grad_entropy ? pointer<A>(*in.grad_entropy) : nullptr,
      {nullptr, in.grad_entropy ? pointer<A>(in.entropy) : nullptr, pointer<A>(in.max), pointer<A>(in.log_sum)},
      A(1.0 / in.temperature)};
  const RowPages pages(grad, logits, rows.rows);
  parallel_rows(rows.rows, rows.V, [&](int64_t begin, int64_t end) {
    pages.for_each_batch(begin, end, [&](int64_t first, int64_t last) { backward_rows(job, first, last); });
  });
}

void run_backward(const Tensor& logits, const Tensor& grad, const BackwardInput& in) {
  check_logprobs(logits, in.labels, in.mask, in.temperature);
  check_row_stats("logprobs", logits, {{"row_max", in.max}, {"log_sum", in.log_sum}});
  if (in.grad_logprobs) check_row_stats("logprobs", logits, {{"grad_logprobs", *in.grad_logprobs}});
  if (in.grad_entropy)
    check_row_stats("logprobs", logits, {{"grad_entropy", *in.grad_entropy}, {"entropy", in.entropy}});
  const LogitRows rows = logit_rows("logprobs", "logits", logits), grad_rows = logit_rows("logprobs", "grad", grad);
  check_labels(in.labels, mask_pointer(in.mask), rows.V);
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return backward<float, float>(logits, rows, grad, grad_rows, in);
    case ScalarType::BFloat16:
      return backward<BFloat16, float>(logits, rows, grad, grad_rows, in);
    case ScalarType::Half:
      return backward<Half, float>(logits, rows, grad, grad_rows, in);
    case ScalarType::Double:
      return backward<double, double>(logits, rows, grad, grad_rows, in);
    default:
      reject_dtype("logprobs", "logits", logits.scalar_type());
  }
}

Tensor logprobs_backward_cpu(Tensor logits, std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy,
                             Tensor labels, std::optional<Tensor> mask, Tensor entropy, Tensor max, Tensor log_sum,
                             double temperature) {
  Tensor grad = new_token_tensor(logits, logits.dim(), logits.scalar_type());
  run_backward(logits, grad, {grad_logprobs, grad_entropy, labels, mask, entropy, max, log_sum, temperature});
  return grad;
}

void logprobs_backward_inplace_cpu(Tensor logits, std::optional<Tensor> grad_logprobs,
                                   std::optional<Tensor> grad_entropy, Tensor labels, std::optional<Tensor> mask,
                                   Tensor entropy, Tensor max, Tensor log_sum, double temperature) {
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
