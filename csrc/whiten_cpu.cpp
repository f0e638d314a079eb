// whiten_cpu.cpp
// Computes  see whiten.h
// Bytes     moments 8 per entry in fp32; whitening 20 (it reads the entries again); backward 28
// Launch    threads over rows of _masked_moments; one thread for whitening, which is small
// Sums      mean, then squared distances from it, in fp64 and in index order: same bits for any threads
// Limits    none

#include "checks.h"
#include "parallel.h"
#include "whiten.h"

namespace ppo_ext {
namespace {

template <class A>
Moments<double> moments_of(const A* values, const A* weights, int64_t n) {
  double weight = 0, sum = 0, m2 = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (weights[i] == A(0)) continue;
    weight += weights[i];
    sum += double(weights[i]) * values[i];
  }
  const double mean = weight == 0 ? 0 : sum / weight;
  for (int64_t i = 0; i < n; ++i) {
    if (weights[i] == A(0)) continue;
    const double gap = values[i] - mean;
    m2 += weights[i] * gap * gap;
  }
  return {weight, mean, m2};
}

template <class A>
void write_moments(const Moments<double>& m, A* out) {
  out[0] = A(m.weight);
  out[1] = A(m.mean);
  out[2] = A(biased_var(m));
}

template <class A>
void moments(const Tensor& values, const Tensor& weights, const Tensor& out) {
  const int64_t columns = values.size(1);
  const A *x = pointer<A>(values), *w = pointer<A>(weights);
  A* result = pointer<A>(out);
  parallel_rows(values.size(0), 2 * columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) write_moments(moments_of(x + r * columns, w + r * columns, columns), result + 3 * r);
  });
}

template <class A>
void whiten(const Tensor& values, const Tensor& weights, bool shift_mean, const Tensor& whitened, const Tensor& moments) {
  const A *x = pointer<A>(values), *w = pointer<A>(weights);
  A* y = pointer<A>(whitened);
  const Moments<double> m = moments_of(x, w, values.numel());
  const double scale = whiten_scale(m.weight, biased_var(m));
  for (int64_t i = 0; i < values.numel(); ++i)
    y[i] = w[i] == A(0) ? A(0) : A(whiten_one(double(x[i]), m.mean, scale, shift_mean));
  write_moments(m, pointer<A>(moments));
}

template <class A>
void whiten_backward(const Tensor& grad, const Tensor& values, const Tensor& weights, const Tensor& moments, bool shift_mean,
                     const Tensor& out) {
  const A *g = pointer<A>(grad), *x = pointer<A>(values), *w = pointer<A>(weights), *saved = pointer<A>(moments);
  A* result = pointer<A>(out);
  const int64_t n = values.numel();
  const Moments<double> m{saved[0], saved[1], 0};
  const double scale = whiten_scale(m.weight, double(saved[2]));
  double sum_grad = 0, sum_grad_centred = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (w[i] == A(0)) continue;
    sum_grad += g[i];
    sum_grad_centred += g[i] * (x[i] - m.mean);
  }
  for (int64_t i = 0; i < n; ++i)
    result[i] = w[i] == A(0)
                    ? A(0)
                    : A(whiten_grad(double(g[i]), double(x[i]), double(w[i]), m, scale, sum_grad, sum_grad_centred, shift_mean));
}

// ---- entry points ----

Tensor masked_moments_cpu(Tensor values, Tensor weights) {
  check_weighted("masked_mean", values, weights);
  if (values.dim() != 2) reject("masked_mean", "values", "have the shape [R, C]", shape_text(values));
  Tensor out = new_tensor(values, {values.size(0), 3}, values.scalar_type());
  (values.scalar_type() == ScalarType::Double ? moments<double> : moments<float>)(values, weights, out);
  return out;
}

std::tuple<Tensor, Tensor> masked_whiten_cpu(Tensor values, Tensor weights, bool shift_mean) {
  check_weighted("masked_whiten", values, weights);
  Tensor whitened = new_token_tensor(values, values.dim(), values.scalar_type());
  Tensor moments = new_tensor(values, {3}, values.scalar_type());
  (values.scalar_type() == ScalarType::Double ? whiten<double> : whiten<float>)(values, weights, shift_mean, whitened, moments);
  return {whitened, moments};
}

Tensor masked_whiten_backward_cpu(Tensor grad, Tensor values, Tensor weights, Tensor moments, bool shift_mean) {
  check_weighted("masked_whiten", values, weights);
  require_token_tensor("masked_whiten", "grad", grad, values, values.dim(), values.scalar_type());
  require_dtype("masked_whiten", "moments", moments, values.scalar_type());
  if (moments.numel() != 3) reject("masked_whiten", "moments", "have 3 entries", moments.numel());
  Tensor out = new_token_tensor(values, values.dim(), values.scalar_type());
  const auto f = values.scalar_type() == ScalarType::Double ? whiten_backward<double> : whiten_backward<float>;
  f(grad, values, weights, moments, shift_mean, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_masked_moments", TORCH_BOX(&masked_moments_cpu));
  m.impl("_masked_whiten", TORCH_BOX(&masked_whiten_cpu));
  m.impl("_masked_whiten_backward", TORCH_BOX(&masked_whiten_backward_cpu));
}

}  // namespace ppo_ext
