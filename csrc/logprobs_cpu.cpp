// logprobs_cpu.cpp
// Computes  see logprobs.h
// Bytes     forward N*V*s + 16N, backward 2*N*V*s + 24N   (s = size of a logit; each logit once per pass, from memory)
// Launch    threads over rows, each row in blocks that stay in the first-level cache; strided rows through a buffer
// Sums      some vectors in fp32, the rest in fp64, in an order that depends on V only: same bits for any threads
// Limits    a label outside [0, V) on a counted row is an error; masked rows are not read

#include "logprobs_cpu.h"
#include "common/pages.h"
#include "common/parallel.h"
#include "logprobs_entry.h"

namespace ppo_ext {
namespace {

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
      const A c = job.inv_temperature.of(n);
      state = row_state(row, c, job.entropy);
      log_sum = softmax_log_sum(state.sum);
      logprob = token_logprob(double(row.logits[job.labels[n] * row.stride]), state.max, log_sum, double(c));
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
    const A c = job.inv_temperature.of(n);
    const A entropy = job.entropy ? job.entropy[n] : A(0), max = job.max[n], log_sum = job.log_sum[n];
    // Computed before the row is filled, which overwrites the logits if the gradient goes there.
    const A logprob = token_logprob(A(row.logits[job.labels[n] * row.stride]), max, log_sum, c);
    fill_gradient(row, logit_grad_of_row(g, h, entropy, c), max, log_sum, c, out, stride);
    out[job.labels[n] * stride] = T(token_logit_grad(logprob, g, h, entropy, c));
  }
}

// ---- both passes ----

// Refuses labels outside [0, V) on rows that count.
void check_labels(const Tensor& labels, const bool* mask, int64_t V) {
  const int64_t* ids = pointer<int64_t>(labels);
  for (int64_t n = 0; n < labels.numel(); ++n)
    if ((!mask || mask[n]) && (ids[n] < 0 || ids[n] >= V)) {
      const char* const hint = ids[n] == -100 ? "; leave rows without a label out by the mask" : "";
      reject("logprobs", "labels" + position_text(labels, labels.dim(), n),
             "be an id in [0, " + std::to_string(V) + ")", std::to_string(ids[n]) + hint);
    }
}

struct OnCPU {
  // There is nothing to note in job.label_note, as a bad label is an error.
  template <class T, class A>
  static void forward(const LogprobsJob<T, A>& job, const Tensor& labels) {
    check_labels(labels, job.mask, job.rows.V);
    check_temperatures("logprobs", job.inv_temperature, job.mask, job.rows.rows, labels, labels.dim());
    parallel_rows(job.rows.rows, job.rows.V, [&](int64_t begin, int64_t end) { forward_rows(job, begin, end); });
  }

  template <class T, class A>
  static void backward(const LogprobsBackwardJob<T, A>& job, const Tensor& labels, const Tensor& grad) {
    check_labels(labels, job.mask, job.rows.V);
    check_temperatures("logprobs", job.inv_temperature, job.mask, job.rows.rows, labels, labels.dim());
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
