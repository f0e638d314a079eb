// masked_cpu.cpp
// Computes  see masked.h
// Bytes     moments 8 per entry in fp32; whitening 20 (it reads the entries again); backward 28
// Launch    threads over chunks of 16384 entries, which end with their row
// Sums      distances from one of a chunk's entries, in fp64, and the chunks in their order: same bits for any threads
// Limits    none

#include <vector>

#include "common/parallel.h"
#include "masked_entry.h"
#include "masked_simd.h"

namespace ppo_ext {
namespace {

constexpr int64_t kChunk = 16384;

// Calls f(i, first, count) for chunk i of all rows: its first entry and how many it has.
template <class F>
void for_each_chunk(int64_t rows, int64_t columns, const F& f) {
  const int64_t chunks = (columns + kChunk - 1) / kChunk;
  parallel_rows(rows * chunks, 2 * std::min(columns, kChunk), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * kChunk;
      f(i, i / chunks * columns + first, std::min(columns - first, kChunk));
    }
  });
}

template <class A>
WeightedEntries<A> chunk_of(const WeightedEntries<A>& in, int64_t first, int64_t count) {
  return {in.values + first, in.weights + first, count};
}

template <class A>
std::vector<Moments> moments_of_rows(const WeightedEntries<A>& in, int64_t rows) {
  const int64_t columns = rows ? in.count / rows : 0, chunks = (columns + kChunk - 1) / kChunk;
  std::vector<Moments> parts(rows * chunks), result(rows, Moments{});
  for_each_chunk(rows, columns, [&](int64_t i, int64_t first, int64_t count) {
    parts[i] = PPO_AT_LEVEL(moments_of, chunk_of(in, first, count));
  });
  for (int64_t i = 0; i < rows * chunks; ++i) result[i / chunks] = moments_merge(result[i / chunks], parts[i]);
  return result;
}

struct OnCPU {
  template <class A>
  static void moments(const WeightedEntries<A>& in, int64_t rows, A* out, const Tensor&) {
    for (const Moments& m : moments_of_rows(in, rows)) {
      write_moments(m, out);
      out += kSavedMoments;
    }
  }

  template <class A>
  static void whiten(const WeightedEntries<A>& in, const WhitenOptions& options, A* whitened, A* moments,
                     const Tensor&) {
    const Moments m = moments_of_rows(in, 1)[0];
    for_each_chunk(1, in.count, [&](int64_t, int64_t first, int64_t count) {
      PPO_AT_LEVEL(fill_whitened, chunk_of(in, first, count), m, options, whitened + first);
    });
    write_moments(m, moments);
  }

  template <class A>
  static void whiten_backward(const WeightedEntries<A>& in, const A* grad, const A* moments,
                              const WhitenOptions& options, A* out, const Tensor&) {
    const Moments m = read_moments(moments);
    std::vector<GradSums> parts((in.count + kChunk - 1) / kChunk);
    for_each_chunk(1, in.count, [&](int64_t i, int64_t first, int64_t count) {
      parts[i] = PPO_AT_LEVEL(grad_sums_of, chunk_of(in, first, count), grad + first, options.subtracted(m.mean));
    });
    GradSums sums{};
    for (const GradSums& part : parts) sums = grad_sums_merge(sums, part);
    const WhitenGrad all = whiten_grad_of(m, sums, options);
    for_each_chunk(1, in.count, [&](int64_t, int64_t first, int64_t count) {
      PPO_AT_LEVEL(fill_gradient, chunk_of(in, first, count), grad + first, all, out + first);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_masked_moments", TORCH_BOX(&masked_moments<OnCPU>));
  m.impl("_masked_whiten", TORCH_BOX(&masked_whiten<OnCPU>));
  m.impl("_masked_whiten_backward", TORCH_BOX(&masked_whiten_backward<OnCPU>));
}

}  // namespace ppo_ext
