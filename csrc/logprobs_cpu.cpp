// logprobs_cpu.cpp
// Computes  see logprobs.h
// Bytes     forward N*V*s + 16N, backward 2*N*V*s + 24N   (s = size of a logit; each logit once per pass, from memory)
// Launch    threads over rows, each row in blocks that stay in the first-level cache; strided rows through a buffer
// Sums      some vectors in fp32, the rest in fp64, in an order that depends on V only: same bits for any threads
// Limits    a label outside [0, V) on a counted row is an error; masked rows are not read

#include "common/pages.h"
#include "common/parallel.h"
#include "logprobs_entry.h"
#include "logprobs_simd.h"

namespace ppo_ext {
namespace {

constexpr int64_t kBlock = 2048;  // of fp64 logits

// ---- one row, fp64 arithmetic ----

SoftmaxState<double> row_state(const LogitRow<double>& row, double inv_temperature, bool with_entropy) {
  SoftmaxState<double> state = softmax_empty<double>();
  const auto logit = [&](int64_t v) { return row.logits[v * row.stride]; };
  for (int64_t v = 0; v < row.V; ++v) state.max = logit(v) > state.max ? logit(v) : state.max;
  const double origin = state.max == -INFINITY ? 0.0 : state.max;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    double sum = 0, weighted = 0;  // of a block, so that rounding errors grow with the block and not with V
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

// p (alpha - beta log p) as a function of the distance to the largest logit.
template <class T>
void fill_gradient(const LogitRow<T>& row, const LogitGrad<float>& grad, float max, float log_sum,
                   float inv_temperature, T* out, int64_t out_stride) {
  const double share = std::exp(-double(log_sum)), at_zero = share * (grad.alpha + double(grad.beta) * log_sum);
  const RowGrad from_max{max, inv_temperature * float(kLog2E), float(at_zero), float(share * grad.beta * kLn2)};
  PPO_AT_LEVEL(fill_gradient, row, from_max, out, out_stride);
}

// ---- ranges of rows ----

// Row n of a job of either pass.
template <template <class, class> class Job, class T, class A>
LogitRow<T> row_of(const Job<T, A>& job, int64_t n) {
  return {job.logits + job.rows.offset(n), job.rows.stride_v, job.rows.V};
}

template <class T, class A>
void forward_rows(const LogprobsJob<T, A>& job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    SoftmaxState<double> state{};
    double logprob = 0, entropy = 0, log_sum = 0;
    if (!job.mask || job.mask[n]) {
      const LogitRow<T> row = row_of(job, n);
      state = row_state(row, job.inv_temperature, job.entropy);
      log_sum = softmax_log_sum(state.sum);
      logprob = token_logprob(double(row.logits[job.labels[n] * row.stride]), state.max, log_sum,
                              double(job.inv_temperature));
      entropy = row_entropy(state.sum, log_sum, state.weighted);
    }
    job.logprobs[n] = A(logprob);
    if (job.entropy) job.entropy[n] = A(entropy);
    job.max[n] = A(state.max);
    job.log_sum[n] = A(log_sum);
  }
}

template <class T, class A>
void backward_rows(const LogprobsBackwardJob<T, A>& job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const LogitRow<T> row = row_of(job, n);
    T* out = job.grad + job.grad_rows.offset(n);
    const int64_t stride = job.grad_rows.stride_v;
    if (job.mask && !job.mask[n]) {
      for (int64_t v = 0; v < row.V; ++v) out[v * stride] = T(0);
      continue;
    }
    const A g = job.grad_logprobs ? job.grad_logprobs[n] : A(0), h = job.grad_entropy ? job.grad_entropy[n] : A(0);
    const A entropy = job.entropy ? job.entropy[n] : A(0), max = job.max[n], log_sum = job.log_sum[n];
    // Computed before the row is filled, which overwrites the logits if the gradient goes there.
    const A logprob = token_logprob(A(row.logits[job.labels[n] * row.stride]), max, log_sum, job.inv_temperature);
    fill_gradient(row, logit_grad_of_row(g, h, entropy, job.inv_temperature), max, log_sum, job.inv_temperature, out,
                  stride);
    out[job.labels[n] * stride] = T(token_logit_grad(logprob, g, h, entropy, job.inv_temperature));
  }
}

// ---- both passes ----

// Refuses labels outside [0, V) on rows that count.
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

struct OnCPU {
  // There is nothing to note in job.label_note, as a bad label is an error.
  template <class T, class A>
  static void forward(const LogprobsJob<T, A>& job, const Tensor& labels) {
    check_labels(labels, job.mask, job.rows.V);
    parallel_rows(job.rows.rows, job.rows.V, [&](int64_t begin, int64_t end) { forward_rows(job, begin, end); });
  }

  template <class T, class A>
  static void backward(const LogprobsBackwardJob<T, A>& job, const Tensor& labels, const Tensor& grad) {
    check_labels(labels, job.mask, job.rows.V);
    const RowPages pages(grad, job.logits, job.rows.rows);
    parallel_rows(job.rows.rows, job.rows.V, [&](int64_t begin, int64_t end) {
      pages.for_each_batch(begin, end, [&](int64_t first, int64_t last) { backward_rows(job, first, last); });
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_logprobs", TORCH_BOX(&logprobs<OnCPU>));
  m.impl("_logprobs_backward", TORCH_BOX(&logprobs_backward<OnCPU>));
  m.impl("_logprobs_backward_", TORCH_BOX(&logprobs_backward_inplace<OnCPU>));
}

}  // namespace ppo_ext
