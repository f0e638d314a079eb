// ppo_loss_options_simd.cpp: the tokens of ppo_loss_options_cpu.cpp, a vector of them at a time.
// Sums      fp64, lane by lane; the order depends on the numbers of tokens and rows only

#include "ppo_loss_options_simd.h"

#include <algorithm>

#include "common/simd.h"

namespace ppo_ext {

template <>
struct Exponential<f32v> {
  static PPO_INLINE f32v of(f32v x) { return exp_of(x); }
};

template <>
struct Exponential<f64v> {
  static PPO_INLINE f64v of(f64v x) {
    for (int k = 0; k < kLanesOf<double>; ++k) x[k] = exp(x[k]);
    return x;
  }
};

namespace {

// ---- sums of several rows ----

template <class A>
struct RowSums : PPOSummed<LaneSum, LaneCount<A>>, PPOOptionSummed<LaneSum, LaneCount<A>> {
  using V = vector_of<A>;
  LaneMoments<A> returns, values;
  V ratio_max, ratio_min;
  double rows;

  PPO_INLINE void add(const PPOOptionToken<V>& x, const PPOOptionTerms<V>& terms, condition_of<A> counts,
                      const PPOGiven& given) {
    const V zero = Number<V>::of(0), weights = counts ? Number<V>::of(1) : zero;
    const auto add = [&](auto& sum, V term) PPO_INLINE_LAMBDA { sum.add(counts ? term : zero); };
    this->for_each(terms, add);
    this->for_each_option(terms, add, given);
    returns.add(x.ret, weights);
    values.add(x.value, weights);
    ratio_max = counts ? max_or_nan(ratio_max, terms.ratio) : ratio_max;
    ratio_min = counts ? min_or_nan(ratio_min, terms.ratio) : ratio_min;
  }

  PPO_INLINE PPOOptionSums sums() const {
    PPOOptionSums result = ppo_no_option_sums();
    const auto total = [](double& sum, const auto& lanes) PPO_INLINE_LAMBDA { sum = lanes.total(); };
    result.for_each(*this, total);
    result.for_each_option(*this, total);
    result.returns = returns.moments();
    result.values = values.moments();
    for (int k = 0; k < kLanesOf<A>; ++k) {
      result.ratio_max = max_or_nan(result.ratio_max, double(ratio_max[k]));
      result.ratio_min = min_or_nan(result.ratio_min, double(ratio_min[k]));
    }
    result.rows = rows;
    return result;
  }
};

// ---- one row ----

// Calls f(first token, tokens, condition of those that count) for each vector of tokens [begin, end).
template <class A, class F>
PPO_INLINE void for_each_vector(const bool* mask, int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end; i += kLanesOf<A>) {
    const int n = int(std::min<int64_t>(kLanesOf<A>, end - i));
    f(i, n, n == kLanesOf<A> ? lanes_where<A>(mask + i) : lanes_where_tail<A>(mask + i, n));
  }
}

template <class A>
PPO_INLINE vector_of<A> load_counted(const A* from, int64_t i, int n, condition_of<A> counts) {
  const vector_of<A> entries = n == kLanesOf<A> ? load(from + i) : load_tail(from + i, n);
  return counts ? entries : Number<vector_of<A>>::of(0);
}

template <class A>
PPO_INLINE void store_some(A* to, int64_t i, int n, vector_of<A> y) {
  n == kLanesOf<A> ? store(to + i, y) : store_tail(to + i, y, n);
}

template <class A>
PPO_INLINE PPORow<A> row_of(const PPOOptionsJob<A>& job, int64_t row, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) count += job.mask[i];
  LaneSum log_ratios;
  if (job.options.ratio_level != kTokenRatio)
    for_each_vector<A>(job.mask, begin, end, [&](int64_t i, int n, condition_of<A> counts) PPO_INLINE_LAMBDA {
      log_ratios.add(load_counted(job.logprobs, i, n, counts) - load_counted(job.old_logprobs, i, n, counts));
    });
  return ppo_row(job, row, double(count), log_ratios.total());
}

template <class A>
PPO_INLINE void fill_row(const PPOOptionsJob<A>& job, const PPORow<A>& row, int64_t begin, int64_t end,
                         RowSums<A>& sums) {
  using V = vector_of<A>;
  // copies: the compiler must assume that the results overwrite the job's
  const PPOOptions options = job.options;
  const PPOGiven given = job.given;
  const PPORow<V> wide{Number<V>::of(row.weight), Number<V>::of(row.ratio), Number<V>::of(row.gate), row.count};
  LaneSum slopes;
  for_each_vector<A>(job.mask, begin, end, [&](int64_t i, int n, condition_of<A> counts) PPO_INLINE_LAMBDA {
    const V zero = Number<V>::of(0);
    const PPOOptionToken<V> x =
        ppo_read_options<V>(job, [&](const A* from) PPO_INLINE_LAMBDA { return load_counted(from, i, n, counts); });
    const PPOOptionTerms<V> terms = ppo_option_terms(x, wide, job, options);
    sums.add(x, terms, counts, given);
    slopes.add(counts ? terms.grad_row : zero);
    ppo_write_options(terms, job, [&](V y, A* to) PPO_INLINE_LAMBDA { store_some(to, i, n, counts ? y : zero); });
  });
  if (options.ratio_level != kSequenceRatio) return;
  const A share = ppo_row_gradient(row, slopes.total());
  for (int64_t i = begin; i < end; ++i)
    if (job.mask[i]) job.grad_logprobs[i] += share;
}

template <class A>
PPO_INLINE PPOOptionSums fill(const PPOOptionsJob<A>& job, int64_t begin, int64_t end, int64_t length) {
  const auto counts = [&](int64_t i) PPO_INLINE_LAMBDA { return job.mask[i]; };
  const int64_t first = begin * length, last = std::min(end * length, job.tokens);
  using V = vector_of<A>;
  RowSums<A> sums{};
  if (job.vpreds) {
    sums.returns.origin = first_finite(job.returns, first, last, counts);
    sums.values.origin = first_finite(job.values, first, last, counts);
  }
  sums.ratio_max = Number<V>::of(-INFINITY);
  sums.ratio_min = Number<V>::of(INFINITY);
  const bool by_row = job.options.by_row();
  for (int64_t r = begin; r < end; ++r) {
    const int64_t from = r * length, to = std::min(from + length, job.tokens);
    const PPORow<A> row = by_row ? row_of(job, r, from, to) : PPORow<A>{A(1), A(1), A(1), 1.0};
    sums.rows += row.count > 0 ? 1 : 0;
    fill_row(job, row, from, to, sums);
  }
  PPOOptionSums result = sums.sums();
  if (!by_row) {  // then the weights are 1
    result.loss_kl = result.ref_kl;
    result.loss_entropy = result.entropy;
  }
  return result;
}

}  // namespace

namespace PPO_LEVEL {
PPOOptionSums fill_rows(const PPOOptionsJob<float>& job, int64_t begin, int64_t end, int64_t length) {
  return fill(job, begin, end, length);
}
PPOOptionSums fill_rows(const PPOOptionsJob<double>& job, int64_t begin, int64_t end, int64_t length) {
  return fill(job, begin, end, length);
}
}  // namespace PPO_LEVEL

}  // namespace ppo_ext
