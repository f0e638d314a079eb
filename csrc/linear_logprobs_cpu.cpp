// linear_logprobs_cpu.cpp
// Computes  see linear_logprobs.h; ppo_ext/ops/linear_logprobs.py makes the tiles, by torch's matrix product
// Bytes     fold N*C*4, gradient 2*N*C*4 of a tile of C columns, which the product has just left in a cache
// Launch    threads over rows, each row a vector at a time
// Sums      some vectors in fp32, the rest in fp64, in an order that depends on C and V only: same bits for any threads
// Limits    a label outside of the tile is not read; that it is in none is for the caller to refuse

#include "common/parallel.h"
#include "linear_logprobs_entry.h"
#include "linear_logprobs_simd.h"
#include "logprobs_cpu.h"

namespace ppo_ext {
namespace {

constexpr int64_t kSlopeBlock = 2048;  // of logits that are kept until their gradient was computed

// ---- fp32 by the level's functions, fp64 one number at a time ----

void map_row(float* x, int64_t width, const LogitMap<float>& map) { PPO_AT_LEVEL(map_row, x, width, map); }

void map_row(double* x, int64_t width, const LogitMap<double>& map) {
  for (int64_t v = 0; v < width; ++v) x[v] = map.logit(x[v]);
}

RowStatistics row_statistics(const float* z, int64_t width, double max, float inv_temperature) {
  return PPO_AT_LEVEL(row_statistics, z, width, float(max), inv_temperature * float(kLog2E));
}

RowStatistics row_statistics(const double* z, int64_t width, double max, double inv_temperature) {
  RowStatistics sums{0, 0, -INFINITY};
  for (int64_t v = 0; v < width; ++v) {
    sums.squares += std::exp(2 * (z[v] - (max == -INFINITY ? 0 : max)) * inv_temperature);
    sums.total += z[v];
    sums.best = z[v] > sums.best ? z[v] : sums.best;
  }
  return sums;
}

void apply_slope(float* grad, const float* z, int64_t n, const LogitMap<float>& map) {
  PPO_AT_LEVEL(apply_slope, grad, z, n, map);
}

void apply_slope(double* grad, const double* z, int64_t n, const LogitMap<double>& map) {
  for (int64_t v = 0; v < n; ++v) grad[v] *= map.slope(z[v]);
}

// ---- one row of a tile ----

template <class A>
LinearState state_of_part(const LinearFoldJob<A>& job, const A* z, int64_t label, A inv_temperature) {
  const LogitTile<A>& tile = job.tile;
  LinearState part = linear_empty();
  part.softmax = row_state(LogitRow<A>{z, 1, tile.width}, inv_temperature, job.with_entropy);
  if (tile.has(label)) part.target = z[label - tile.first];
  if (!job.with_statistics) return part;
  const RowStatistics sums = row_statistics(z, tile.width, part.softmax.max, inv_temperature);
  part.squares = sums.squares;
  part.total = sums.total;
  part.best = sums.best;
  return part;
}

template <class A>
void fold_row(const LinearFoldJob<A>& job, int64_t n) {
  const LogitTile<A>& tile = job.tile;
  A* z = tile.row(n);
  if (!job.map.is_identity()) map_row(z, tile.width, job.map);
  const A inv_temperature = job.inv_temperature.of(n);
  const LinearState before = tile.first == 0 ? linear_empty() : job.states[n];
  LinearState part = state_of_part(job, z, job.labels[n], inv_temperature);
  if (part.best > before.best) part.best_id = tile.first + (std::find(z, z + tile.width, A(part.best)) - z);
  const LinearState state = linear_merge(before, part, inv_temperature);
  job.states[n] = state;
  if (tile.is_last())
    linear_results(state, job.labels[n], tile.V, double(inv_temperature), job.results + n * kLinearResults);
}

// The gradient with respect to the logits, and where they are not the product itself, times the slope of the map.
template <class A>
void gradient_row(const LinearGradientJob<A>& job, int64_t n) {
  const LogitTile<A>& tile = job.tile;
  A* x = tile.row(n);
  const A c = job.inv_temperature.of(n), max = job.max[n], log_sum = job.log_sum[n];
  const A g = job.grad_logprobs[n], h = job.grad_entropy ? job.grad_entropy[n] : A(0);
  const A entropy = job.entropy ? job.entropy[n] : A(0);
  const LogitGrad<A> grad = logit_grad_of_row(g, h, entropy, c);
  const int64_t label = tile.has(job.labels[n]) ? job.labels[n] - tile.first : -1;
  const A target = label < 0 ? A(0) : job.map.logit(x[label]);
  if (job.map.is_identity()) {
    fill_gradient(LogitRow<A>{x, 1, tile.width}, grad, max, log_sum, c, x, 1);
  } else {
    A logits[kSlopeBlock];
    map_row(x, tile.width, job.map);
    for (int64_t begin = 0; begin < tile.width; begin += kSlopeBlock) {
      const int64_t count = std::min(kSlopeBlock, tile.width - begin);
      std::copy(x + begin, x + begin + count, logits);
      fill_gradient(LogitRow<A>{logits, 1, count}, grad, max, log_sum, c, x + begin, 1);
      apply_slope(x + begin, logits, count, job.map);
    }
  }
  if (label >= 0)
    x[label] = token_logit_grad(token_logprob(target, max, log_sum, c), g, h, entropy, c) * job.map.slope(target);
}

struct OnCPU {
  template <class A>
  static void fold(const LinearFoldJob<A>& job, const Tensor&) {
    parallel_rows(job.tile.rows, job.tile.width, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) fold_row(job, n);
    });
  }

  template <class A>
  static void gradient(const LinearGradientJob<A>& job, const Tensor&) {
    parallel_rows(job.tile.rows, job.tile.width, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) gradient_row(job, n);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_linear_logprobs_fold", TORCH_BOX(&linear_logprobs_fold<OnCPU>));
  m.impl("_linear_logprobs_gradient", TORCH_BOX(&linear_logprobs_gradient<OnCPU>));
}

}  // namespace ppo_ext
