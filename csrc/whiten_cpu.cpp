// whiten_cpu.cpp
// Computes  see whiten.h
// Bytes     moments 8 per entry in fp32; whitening 20 (it reads the entries again); backward 28
// Launch    threads over rows of _masked_moments; one thread for whitening, which is small
// Sums      mean, then squared distances from it, in fp64, in an order that depends on the length only: same bits for any threads
// Limits    none

#include "checks.h"
#include "parallel.h"
#include "simd.h"
#include "whiten.h"

namespace ppo_ext {
namespace {

constexpr int kSums = 8;  // sums side by side, so that additions need not wait for each other

// Calls term(i, k), k = i mod 8, for i in order; term adds to its k-th sum and must cost the same for masked entries.
template <class F>
PPO_INLINE void for_each_sum(int64_t n, const F& term) {
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; ++k) term(i + k, k);
  for (int k = 0; i < n; ++i, ++k) term(i, k);
}

PPO_INLINE double total(const double (&sums)[kSums]) {
  double result = 0;
  for (int k = 0; k < kSums; ++k) result += sums[k];
  return result;
}

template <class A>
PPO_INLINE Moments<double> moments_of(const A* values, const A* weights, int64_t n) {
  double weight[kSums] = {}, sum[kSums] = {}, m2[kSums] = {};
  for_each_sum(n, [&](int64_t i, int k) PPO_INLINE_LAMBDA {
    const double w = weights[i], x = w == 0 ? 0 : values[i];
    weight[k] += w;
    sum[k] += w * x;
  });
  const double all = total(weight), mean = all == 0 ? 0 : total(sum) / all;
  for_each_sum(n, [&](int64_t i, int k) PPO_INLINE_LAMBDA {
    const double w = weights[i], gap = w == 0 ? 0 : values[i] - mean;
    m2[k] += w * gap * gap;
  });
  return {all, mean, total(m2)};
}

template <class A>
PPO_INLINE void fill_whitened_entries(const A* x, const A* w, int64_t n, const Moments<double>& m, bool shift_mean, A* y) {
  const double scale = whiten_scale(m.weight, biased_var(m));
  for (int64_t i = 0; i < n; ++i) y[i] = w[i] == A(0) ? A(0) : A(whiten_one(double(x[i]), m.mean, scale, shift_mean));
}

template <class A>
PPO_INLINE void fill_gradient_entries(const A* g, const A* x, const A* w, int64_t n, const Moments<double>& m, bool shift_mean,
                                      A* out) {
  const double scale = whiten_scale(m.weight, biased_var(m));
  double sum[kSums] = {}, sum_centred[kSums] = {};
  for_each_sum(n, [&](int64_t i, int k) PPO_INLINE_LAMBDA {
    const double gi = w[i] == A(0) ? 0 : g[i], gap = w[i] == A(0) ? 0 : x[i] - m.mean;
    sum[k] += gi;
    sum_centred[k] += gi * gap;
  });
  const double sum_grad = total(sum), sum_grad_centred = total(sum_centred);
  for (int64_t i = 0; i < n; ++i)
    out[i] = w[i] == A(0)
                 ? A(0)
                 : A(whiten_grad(double(g[i]), double(x[i]), double(w[i]), m, scale, sum_grad, sum_grad_centred, shift_mean));
}

#define PPO_DEFINE_LOOPS(A)                                                                                                  \
  PPO_CLONES Moments<double> moments(const A* x, const A* w, int64_t n) { return moments_of(x, w, n); }                      \
  PPO_CLONES void fill_whitened(const A* x, const A* w, int64_t n, const Moments<double>& m, bool shift_mean, A* y) {        \
    fill_whitened_entries(x, w, n, m, shift_mean, y);                                                                        \
  }                                                                                                                          \
  PPO_CLONES void fill_gradient(const A* g, const A* x, const A* w, int64_t n, const Moments<double>& m, bool shift_mean,    \
                                A* out) {                                                                                    \
    fill_gradient_entries(g, x, w, n, m, shift_mean, out);                                                                   \
  }
PPO_DEFINE_LOOPS(float)
PPO_DEFINE_LOOPS(double)

template <class A>
void write_moments(const Moments<double>& m, A* out) {
  out[0] = A(m.weight);
  out[1] = A(m.mean);
  out[2] = A(biased_var(m));
}

template <class A>
void fill_moments(const Tensor& values, const Tensor& weights, const Tensor& out) {
  const int64_t columns = values.size(1);
  const A *x = pointer<A>(values), *w = pointer<A>(weights);
  A* result = pointer<A>(out);
  parallel_rows(values.size(0), 2 * columns, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) write_moments(moments(x + r * columns, w + r * columns, columns), result + 3 * r);
  });
}

template <class A>
void whiten(const Tensor& values, const Tensor& weights, bool shift_mean, const Tensor& whitened, const Tensor& out) {
  const A *x = pointer<A>(values), *w = pointer<A>(weights);
  const Moments<double> m = moments(x, w, values.numel());
  fill_whitened(x, w, values.numel(), m, shift_mean, pointer<A>(whitened));
  write_moments(m, pointer<A>(out));
}

template <class A>
void whiten_backward(const Tensor& grad, const Tensor& values, const Tensor& weights, const Tensor& moments, bool shift_mean,
                     const Tensor& out) {
  const A* saved = pointer<A>(moments);
  fill_gradient(pointer<A>(grad), pointer<A>(values), pointer<A>(weights), values.numel(),
                Moments<double>{saved[0], saved[1], double(saved[2]) * saved[0]}, shift_mean, pointer<A>(out));
}

// ---- entry points ----

Tensor masked_moments_cpu(Tensor values, Tensor weights) {
  check_weighted("masked_mean", values, weights);
  if (values.dim() != 2) reject("masked_mean", "values", "have the shape [R, C]", shape_text(values));
  Tensor out = new_tensor(values, {values.size(0), 3}, values.scalar_type());
  (values.scalar_type() == ScalarType::Double ? fill_moments<double> : fill_moments<float>)(values, weights, out);
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
  check_whiten_backward(grad, values, weights, moments);
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
