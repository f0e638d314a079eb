// whiten_cpu.cpp
// Computes  see whiten.h
// Bytes     moments 8 per entry in fp32; whitening 20 (it reads the entries again); backward 28
// Launch    threads over rows of _masked_moments; one thread for whitening, which is small
// Sums      distances from one of the entries, in fp64, in an order that depends on the length only: same bits for any threads
// Limits    none

#include "checks.h"
#include "parallel.h"
#include "whiten_simd.h"

namespace ppo_ext {
namespace {

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
    for (int64_t r = begin; r < end; ++r) {
      const WeightedEntries<A> row{x + r * columns, w + r * columns, columns};
      write_moments(PPO_AT_LEVEL(moments_of, row), result + 3 * r);
    }
  });
}

template <class A>
WeightedEntries<A> entries_of(const Tensor& values, const Tensor& weights) {
  return {pointer<A>(values), pointer<A>(weights), values.numel()};
}

template <class A>
void whiten(const Tensor& values, const Tensor& weights, bool shift_mean, const Tensor& whitened, const Tensor& out) {
  const WeightedEntries<A> in = entries_of<A>(values, weights);
  const Moments<double> m = PPO_AT_LEVEL(moments_of, in);
  PPO_AT_LEVEL(fill_whitened, in, m, shift_mean, pointer<A>(whitened));
  write_moments(m, pointer<A>(out));
}

template <class A>
void whiten_backward(const Tensor& grad, const Tensor& values, const Tensor& weights, const Tensor& moments, bool shift_mean,
                     const Tensor& out) {
  const A* saved = pointer<A>(moments);
  const Moments<double> m{saved[0], saved[1], double(saved[2]) * saved[0]};
  PPO_AT_LEVEL(fill_gradient, entries_of<A>(values, weights), pointer<A>(grad), m, shift_mean, pointer<A>(out));
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
