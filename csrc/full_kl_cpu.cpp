// full_kl_cpu.cpp
// Computes  see full_kl.h
// Bytes     forward 2*N*V*s + 20N, backward 3*N*V*s + 24N   (s = size of a logit; each logit once per pass, from memory)
// Launch    threads over rows, each row in blocks that stay in the first-level cache; strided rows through a buffer
// Sums      some vectors in fp32, the rest in fp64, in an order that depends on V only: same bits for any threads
// Limits    masked rows are not read

#include "common/checks.h"
#include "common/pages.h"
#include "common/parallel.h"
#include "full_kl_simd.h"

namespace ppo_ext {
namespace {

constexpr int64_t kBlock = 2048;  // of fp64 logits

// ---- one row, fp64 arithmetic ----

KLState<double> row_state(const LogitRowPair<double>& row, double inv_temperature) {
  KLState<double> state = kl_empty<double>();
  const auto logit = [&](int64_t v) { return row.logits[v * row.stride]; };
  const auto ref_logit = [&](int64_t v) { return row.ref_logits[v * row.ref_stride]; };
  for (int64_t v = 0; v < row.V; ++v) {
    state.max = logit(v) > state.max ? logit(v) : state.max;
    state.ref_max = ref_logit(v) > state.ref_max ? ref_logit(v) : state.ref_max;
  }
  const double origin = state.max == -INFINITY ? 0.0 : state.max,
               ref_origin = state.ref_max == -INFINITY ? 0.0 : state.ref_max;
  for (int64_t begin = 0; begin < row.V; begin += kBlock) {
    double sum = 0, ref_sum = 0, weighted = 0;  // per block, so that rounding grows with the block and not with V
    for (int64_t v = begin; v < std::min(begin + kBlock, row.V); ++v) {
      const double y = (logit(v) - origin) * inv_temperature, ref_y = (ref_logit(v) - ref_origin) * inv_temperature;
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

void fill_gradient(const LogitRowPair<double>& row, const KLRowGrad<double>& grad, double* out, int64_t out_stride) {
  for (int64_t v = 0; v < row.V; ++v) {
    const double log_p = token_logprob(row.logits[v * row.stride], grad.max, grad.log_sum, grad.inv_temperature);
    const double log_q =
        token_logprob(row.ref_logits[v * row.ref_stride], grad.ref_max, grad.ref_log_sum, grad.inv_temperature);
    const double p = std::exp(log_p);
    out[v * out_stride] = p == 0.0 ? 0.0 : kl_logit_grad(p, log_p, log_q, grad.kl, grad.grad_over_temperature);
  }
}

// ---- one row, fp32 arithmetic ----

template <class T>
KLState<double> row_state(const LogitRowPair<T>& row, float inv_temperature) {
  return PPO_AT_LEVEL(row_state, row, inv_temperature);
}

template <class T>
void fill_gradient(const LogitRowPair<T>& row, const KLRowGrad<float>& grad, T* out, int64_t out_stride) {
  PPO_AT_LEVEL(fill_gradient, row, grad, out, out_stride);
}

// ---- ranges of rows ----

template <class A>
struct RowStats {
  A *kl, *max, *log_sum, *ref_max, *ref_log_sum;
};

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

  LogitRowPair<T> row(int64_t n) const {
    return {logits + rows.offset(n), ref_logits + ref_rows.offset(n), rows.stride_v, ref_rows.stride_v, rows.V};
  }
};

template <class T, class A>
void forward_rows(const Job<T, A>& job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    KLState<double> state{};
    A kl = 0, log_sum = 0, ref_log_sum = 0;
    if (!job.mask || job.mask[n]) {
      state = row_state(job.row(n), job.inv_temperature);
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
void backward_rows(const Job<T, A>& job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    T* out = job.grad + job.grad_rows.offset(n);
    if (job.mask && !job.mask[n]) {
      for (int64_t v = 0; v < job.rows.V; ++v) out[v * job.grad_rows.stride_v] = T(0);
      continue;
    }
    const KLRowGrad<A> grad{job.stats.max[n],         job.stats.log_sum[n], job.stats.ref_max[n],
                            job.stats.ref_log_sum[n], job.stats.kl[n],      job.grad_kl[n] * job.inv_temperature,
                            job.inv_temperature};
    fill_gradient(job.row(n), grad, out, job.grad_rows.stride_v);
  }
}

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
                {pointer<A>(in.kl), pointer<A>(in.max), pointer<A>(in.log_sum), pointer<A>(in.ref_max),
                 pointer<A>(in.ref_log_sum)},
                nullptr,
                nullptr,
                {}};
  if (!in.grad) {
    parallel_rows(job.rows.rows, 2 * job.rows.V, [&](int64_t begin, int64_t end) { forward_rows(job, begin, end); });
    return;
  }
  job.grad_kl = pointer<A>(*in.grad_kl);
  job.grad = pointer<T>(*in.grad);
  job.grad_rows = logit_rows("full_kl", "grad", *in.grad);
  const RowPages pages(*in.grad, in.logits, job.rows.rows);
  parallel_rows(job.rows.rows, 2 * job.rows.V, [&](int64_t begin, int64_t end) {
    pages.for_each_batch(begin, end, [&](int64_t first, int64_t last) { backward_rows(job, first, last); });
  });
}

void dispatch(const Arguments& in) {
  switch (in.logits.scalar_type()) {
    case ScalarType::Float:
      return run<float, float>(in);
    case ScalarType::BFloat16:
      return run<torch::headeronly::BFloat16, float>(in);
    case ScalarType::Half:
      return run<torch::headeronly::Half, float>(in);
    case ScalarType::Double:
      return run<double, double>(in);
    default:
      reject_dtype("full_kl", "logits", in.logits.scalar_type());
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> full_kl_cpu(Tensor logits, Tensor ref_logits,
                                                               std::optional<Tensor> mask, double temperature) {
  check_full_kl(logits, ref_logits, mask, temperature);
  const auto row = [&] { return new_token_tensor(logits, logits.dim() - 1, accumulate_dtype(logits.scalar_type())); };
  Tensor kl = row(), max = row(), log_sum = row(), ref_max = row(), ref_log_sum = row();
  dispatch({logits, ref_logits, mask, temperature, kl, max, log_sum, ref_max, ref_log_sum, nullptr, nullptr});
  return {kl, max, log_sum, ref_max, ref_log_sum};
}

void run_backward(const Tensor& grad, const Arguments& in) {
  check_full_kl(in.logits, in.ref_logits, in.mask, in.temperature);
  check_row_stats("full_kl", in.logits,
                  {{"grad_kl", *in.grad_kl},
                   {"kl", in.kl},
                   {"row_max", in.max},
                   {"log_sum", in.log_sum},
                   {"ref_row_max", in.ref_max},
                   {"ref_log_sum", in.ref_log_sum}});
  Arguments with_grad = in;
  with_grad.grad = &grad;
  dispatch(with_grad);
}

Tensor full_kl_backward_cpu(Tensor logits, Tensor ref_logits, Tensor grad_kl, std::optional<Tensor> mask, Tensor kl,
                            Tensor max, Tensor log_sum, Tensor ref_max, Tensor ref_log_sum, double temperature) {
  Tensor grad = new_token_tensor(logits, logits.dim(), logits.scalar_type());
  run_backward(grad,
               {logits, ref_logits, mask, temperature, kl, max, log_sum, ref_max, ref_log_sum, &grad_kl, nullptr});
  return grad;
}

void full_kl_backward_inplace_cpu(Tensor logits, Tensor ref_logits, Tensor grad_kl, std::optional<Tensor> mask,
                                  Tensor kl, Tensor max, Tensor log_sum, Tensor ref_max, Tensor ref_log_sum,
                                  double temperature) {
  require_no_overlap("full_kl", "logits", logits);
  run_backward(logits,
               {logits, ref_logits, mask, temperature, kl, max, log_sum, ref_max, ref_log_sum, &grad_kl, nullptr});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_full_kl", TORCH_BOX(&full_kl_cpu));
  m.impl("_full_kl_backward", TORCH_BOX(&full_kl_backward_cpu));
  m.impl("_full_kl_backward_", TORCH_BOX(&full_kl_backward_inplace_cpu));
}

}  // namespace ppo_ext
