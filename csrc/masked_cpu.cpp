// masked_cpu.cpp
// Computes  see masked.h
// Bytes     moments 8 per entry in fp32; whitening 20 (it reads the entries again); backward 28
// Launch    threads over chunks of 16384 entries, which end with their row
// Sums      distances from one of a chunk's entries, in fp64, and the chunks in their order: same bits for any threads
// Limits    none

#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "masked_simd.h"

namespace ppo_ext {
namespace {

constexpr int64_t kChunk = 16384;

template <class A>
WeightedEntries<A> entries_of(const Tensor& values, const Tensor& weights) {
  return {pointer<A>(values), pointer<A>(weights), values.numel()};
}

// Calls f(part, first, count) for each chunk of each row: its number, its first entry and how many it has.
template <class F>
void for_each_chunk(int64_t rows, int64_t columns, const F& f) {
  const int64_t chunks = (columns + kChunk - 1) / kChunk;
  parallel_rows(rows * chunks, 2 * std::min(columns, kChunk), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part % chunks * kChunk;
      f(part, part / chunks * columns + first, std::min(columns - first, kChunk));
    }
  });
}

template <class A>
WeightedEntries<A> some_of(const WeightedEntries<A>& in, int64_t first, int64_t count) {
  return {in.values + first, in.weights + first, count};
}

template <class A>
std::vector<Moments<double>> moments_of_rows(const WeightedEntries<A>& in, int64_t rows) {
  const int64_t columns = rows ? in.count / rows : 0, chunks = (columns + kChunk - 1) / kChunk;
  std::vector<Moments<double>> parts(rows * chunks), result(rows, Moments<double>{});
  for_each_chunk(rows, columns, [&](int64_t part, int64_t first, int64_t count) {
    parts[part] = PPO_AT_LEVEL(moments_of, some_of(in, first, count));
  });
  for (int64_t part = 0; part < rows * chunks; ++part)
    result[part / chunks] = moments_merge(result[part / chunks], parts[part]);
  return result;
}

template <class A>
void write_moments(const Moments<double>& m, A* out) {
  out[0] = A(m.weight);
  out[1] = A(m.mean);
  out[2] = A(biased_var(m));
}

template <class A>
void fill_moments(const Tensor& values, const Tensor& weights, const Tensor& out) {
  A* result = pointer<A>(out);
  for (const Moments<double>& m : moments_of_rows(entries_of<A>(values, weights), values.size(0))) {
    write_moments(m, result);
    result += 3;
  }
}

template <class A>
void whiten(const Tensor& values, const Tensor& weights, bool shift_mean, const Tensor& whitened, const Tensor& out) {
  const WeightedEntries<A> in = entries_of<A>(values, weights);
  const Moments<double> m = moments_of_rows(in, 1)[0];
  for_each_chunk(1, in.count, [&](int64_t, int64_t first, int64_t count) {
    PPO_AT_LEVEL(fill_whitened, some_of(in, first, count), m, shift_mean, pointer<A>(whitened) + first);
  });
  write_moments(m, pointer<A>(out));
}

template <class A>
void whiten_backward(const Tensor& grad, const Tensor& values, const Tensor& weights, const Tensor& moments,
                     bool shift_mean, const Tensor& out) {
  const A *saved = pointer<A>(moments), *g = pointer<A>(grad);
  const Moments<double> m{saved[0], saved[1], double(saved[2]) * saved[0]};
  const WeightedEntries<A> in = entries_of<A>(values, weights);
  std::vector<GradSums> parts((in.count + kChunk - 1) / kChunk);
  for_each_chunk(1, in.count, [&](int64_t part, int64_t first, int64_t count) {
    parts[part] = PPO_AT_LEVEL(grad_sums_of, some_of(in, first, count), g + first, m.mean);
  });
  GradSums sums{};
  for (const GradSums& part : parts) sums = {sums.grad + part.grad, sums.centred + part.centred};
  const WhitenGrad all = whiten_grad_of(m, sums.grad, sums.centred, shift_mean);
  for_each_chunk(1, in.count, [&](int64_t, int64_t first, int64_t count) {
    PPO_AT_LEVEL(fill_gradient, some_of(in, first, count), g + first, all, pointer<A>(out) + first);
  });
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
  (values.scalar_type() == ScalarType::Double ? whiten<double> : whiten<float>)(values, weights, shift_mean, whitened,
                                                                                moments);
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
