// full_kl_cpu.cpp
// Computes  see full_kl.h
// Bytes     forward 2*N*V*s + 20N, backward 3*N*V*s + 20N   (s = size of a logit; from memory each logit once per pass)
// Launch    threads over rows, each row in blocks that stay in the first-level cache; strided rows through a buffer
// Sums      some vectors in fp32, the rest in fp64, in an order that depends on the row only: same bits for any threads;
//           rows of at most 8 columns in fp64
// Limits    masked rows are not read

#include "common/pages.h"
#include "common/parallel.h"
#include "full_kl_entry.h"
#include "full_kl_simd.h"

namespace ppo_ext {
namespace {

// ---- one row, fp64 arithmetic ----

KLState<double> row_state(const LogitRowPair<double>& row, const GapScale<double>& scale) {
  return kl_state_of_row(row, scale);
}

void fill_gradient(const LogitRowPair<double>& row, const KLRowGrad<double>& grad, double* out, int64_t out_stride) {
  for (int64_t v = 0; v < row.V; ++v) {
    const double d = row.logits[v * row.stride] - grad.max;
    out[v * out_stride] = kl_logit_grad(std::exp(d * grad.scale.inverse), d, row.ref_logits[v * row.ref_stride], grad);
  }
}

// ---- one row, fp32 arithmetic ----

template <class T>
KLState<double> row_state(const LogitRowPair<T>& row, const GapScale<float>& scale) {
  if (row.V <= kFewColumns) return kl_state_of_row(row, GapScale<double>::of(scale.inverse));
  return PPO_AT_LEVEL(row_state, row, scale);
}

template <class T>
void fill_gradient(const LogitRowPair<T>& row, const KLRowGrad<float>& grad, T* out, int64_t out_stride) {
  PPO_AT_LEVEL(fill_gradient, row, grad, out, out_stride);
}

// ---- ranges of rows ----

template <class T, class A>
void forward_rows(const KLInputs<T, A>& in, A* kl, const KLRowStats<A>& out, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const GapScale<A> scale = GapScale<A>::of(in.inv_temperature.of(n));
    KLState<double> state{};
    KLRow<double> result{};
    if (!in.mask || in.mask[n]) {
      state = row_state(row_pair(in, n), scale);
      result = kl_of_row(state, GapScale<double>::of(scale.inverse));
    }
    kl[n] = A(result.kl);
    out.max[n] = A(state.max);
    out.sum[n] = A(state.sum);
    out.ref_at_max[n] = A(state.ref_at_max);
    out.mean_gap[n] = A(result.mean_gap);
  }
}

template <class T, class A>
void backward_rows(const KLInputs<T, A>& in, const KLRowStats<A>& saved, const KLGradient<T, A>& out, int64_t begin,
                   int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    T* const row = out.grad + out.rows.offset(n);
    if (in.mask && !in.mask[n]) {
      for (int64_t v = 0; v < in.rows.V; ++v) row[v * out.rows.stride_v] = T(0);
      continue;
    }
    const KLRowGrad<A> grad = kl_grad_of_row(out.grad_kl[n], saved.max[n], saved.sum[n], saved.ref_at_max[n],
                                             saved.mean_gap[n], GapScale<A>::of(in.inv_temperature.of(n)));
    fill_gradient(row_pair(in, n), grad, row, out.rows.stride_v);
  }
}

struct OnCPU {
  template <class T, class A>
  static void forward(const KLInputs<T, A>& in, A* kl, const KLRowStats<A>& out, const Tensor& logits) {
    check_temperatures("full_kl", in.inv_temperature, in.mask, in.rows.rows, logits, logits.dim() - 1);
    parallel_rows(in.rows.rows, 2 * in.rows.V,
                  [&](int64_t begin, int64_t end) { forward_rows(in, kl, out, begin, end); });
  }

  template <class T, class A>
  static void backward(const KLInputs<T, A>& in, const KLRowStats<A>& saved, const KLGradient<T, A>& out,
                       const Tensor& grad) {
    check_temperatures("full_kl", in.inv_temperature, in.mask, in.rows.rows, grad, grad.dim() - 1);
    const RowPages pages(grad, in.logits, in.rows.rows);
    parallel_rows(in.rows.rows, 2 * in.rows.V, [&](int64_t begin, int64_t end) {
      pages.for_each_batch(begin, end,
                           [&](int64_t first, int64_t last) { backward_rows(in, saved, out, first, last); });
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_full_kl", TORCH_BOX(&full_kl<OnCPU>));
  m.impl("_full_kl_backward", TORCH_BOX(&full_kl_backward<OnCPU>));
  m.impl("_full_kl_backward_", TORCH_BOX(&full_kl_backward_inplace<OnCPU>));
}

}  // namespace ppo_ext
