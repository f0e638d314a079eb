// ppo_loss_cpu.cpp
// Computes  see ppo_loss.h
// Bytes     41 per token in fp32: six inputs, the mask, the ratio, the counted advantages and two gradients
// Launch    threads over blocks of 8192 tokens, each in vectorised chunks
// Sums      fp64 within a chunk, over chunks, then over blocks in their order: same bits for any threads
// Limits    none

#include <vector>

#include "checks.h"
#include "parallel.h"
#include "ppo_loss.h"
#include "simd.h"

namespace ppo_ext {
namespace {

constexpr int64_t kBlock = 8192;  // what a thread takes at a time
constexpr int kChunk = 256;       // what is worked on at a time within it

template <class A>
struct Job {
  const A *logprobs, *old_logprobs, *advantages, *vpreds, *values, *returns;
  const bool* mask;
  A *ratio, *counted_advantages, *grad_logprobs, *grad_vpreds;
  A cliprange, cliprange_value, vf_coef;
};

// A chunk's inputs, 0 where masked, and its terms; entries beyond its end are masked too.
template <class A>
struct Chunk {
  A logprob[kChunk], old_logprob[kChunk], advantage[kChunk], vpred[kChunk], value[kChunk], ret[kChunk], ratio[kChunk];
  A counts[kChunk], pg[kChunk], vf[kChunk], pg_clipped[kChunk], vf_clipped[kChunk], grad_logprob[kChunk], grad_vpred[kChunk];
};

PPO_INLINE void fill_ratios(Chunk<float>& c) {
  for (int i = 0; i < kChunk; i += kLanes) store(c.ratio + i, exp_vector(load(c.logprob + i) - load(c.old_logprob + i)));
}

PPO_INLINE void fill_ratios(Chunk<double>& c) {
  for (int i = 0; i < kChunk; ++i) c.ratio[i] = token_ratio(c.logprob[i], c.old_logprob[i]);
}

template <class A>
PPO_INLINE void read_chunk(const Job<A>& job, int64_t begin, int n, Chunk<A>& c) {
  for (int i = 0; i < n; ++i) c.counts[i] = job.mask[begin + i] ? A(1) : A(0);
  for (int i = n; i < kChunk; ++i) c.counts[i] = A(0);
  const auto read = [&](const A* from, A* to) PPO_INLINE_LAMBDA {
    for (int i = 0; i < n; ++i) to[i] = c.counts[i] != A(0) ? from[begin + i] : A(0);
    for (int i = n; i < kChunk; ++i) to[i] = A(0);
  };
  read(job.logprobs, c.logprob);
  read(job.old_logprobs, c.old_logprob);
  read(job.advantages, c.advantage);
  read(job.vpreds, c.vpred);
  read(job.values, c.value);
  read(job.returns, c.ret);
}

// The terms of a chunk, and the per-token results.
template <class A>
PPO_INLINE void fill_chunk(const Job<A>& job, int64_t begin, int n, Chunk<A>& c) {
  read_chunk(job, begin, n, c);
  fill_ratios(c);
  for (int i = 0; i < kChunk; ++i) {
    const PPOToken<A> x{c.logprob[i], c.old_logprob[i], c.advantage[i], c.vpred[i], c.value[i], c.ret[i]};
    const PPOTerms<A> terms = ppo_terms(x, c.ratio[i], job.cliprange, job.cliprange_value);
    c.pg[i] = terms.pg;
    c.vf[i] = terms.vf;
    c.pg_clipped[i] = terms.pg_clipped;
    c.vf_clipped[i] = terms.vf_clipped;
    c.grad_logprob[i] = terms.grad_logprob;
    c.grad_vpred[i] = job.vf_coef * terms.grad_vpred;
  }
  const auto write = [&](const A* from, A* to) PPO_INLINE_LAMBDA {
    for (int i = 0; i < n; ++i) to[begin + i] = c.counts[i] != A(0) ? from[i] : A(0);
  };
  write(c.ratio, job.ratio);
  write(c.advantage, job.counted_advantages);
  write(c.grad_logprob, job.grad_logprobs);
  write(c.grad_vpred, job.grad_vpreds);
}

// Sum of term(i) over the chunk, in 8 sums side by side; masked entries are 0 or selected away.
template <class F>
PPO_INLINE double chunk_sum(const F& term) {
  double sums[8] = {};
  for (int i = 0; i < kChunk; i += 8)
    for (int k = 0; k < 8; ++k) sums[k] += term(i + k);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class A>
PPO_INLINE Moments<double> chunk_moments(const Chunk<A>& c, const A* x, double count) {
  const double mean = count == 0 ? 0 : chunk_sum([&](int i) PPO_INLINE_LAMBDA { return double(x[i]); }) / count;
  const double m2 = chunk_sum([&](int i) PPO_INLINE_LAMBDA {
    const double gap = c.counts[i] != A(0) ? x[i] - mean : 0;
    return gap * gap;
  });
  return {count, mean, m2};
}

template <class A>
PPO_INLINE PPOSums chunk_sums(const Chunk<A>& c) {
  const auto plain = [&](const A* x) PPO_INLINE_LAMBDA { return chunk_sum([&](int i) PPO_INLINE_LAMBDA { return double(x[i]); }); };
  const auto counted = [&](const A* x) PPO_INLINE_LAMBDA { return chunk_sum([&](int i) PPO_INLINE_LAMBDA { return c.counts[i] != A(0) ? double(x[i]) : 0; }); };
  const double count = plain(c.counts);
  return {counted(c.pg),
          counted(c.vf),
          chunk_sum([&](int i) PPO_INLINE_LAMBDA { return 0.5 * (double(c.logprob[i]) - c.old_logprob[i]) * (double(c.logprob[i]) - c.old_logprob[i]); }),
          chunk_sum([&](int i) PPO_INLINE_LAMBDA { return double(c.old_logprob[i]) - c.logprob[i]; }),
          counted(c.pg_clipped),
          plain(c.advantage),
          counted(c.ratio),
          plain(c.vpred),
          chunk_sum([&](int i) PPO_INLINE_LAMBDA { return (double(c.vpred[i]) - c.ret[i]) * (double(c.vpred[i]) - c.ret[i]); }),
          counted(c.vf_clipped),
          chunk_moments(c, c.ret, count),
          chunk_moments(c, c.value, count)};
}

template <class A>
PPO_INLINE PPOSums fill_tokens(const Job<A>& job, int64_t begin, int64_t end) {
  Chunk<A> chunk;
  PPOSums sums{};
  for (; begin < end; begin += kChunk) {
    const int n = end - begin < kChunk ? int(end - begin) : kChunk;
    fill_chunk(job, begin, n, chunk);
    sums = ppo_merge(sums, chunk_sums(chunk));
  }
  return sums;
}

// Fills the per-token results of tokens [begin, end) and returns their sums.
PPO_CLONES PPOSums fill_block(const Job<float>& job, int64_t begin, int64_t end) { return fill_tokens(job, begin, end); }
PPO_CLONES PPOSums fill_block(const Job<double>& job, int64_t begin, int64_t end) { return fill_tokens(job, begin, end); }

template <class A>
PPOSums sum_all(const Job<A>& job, int64_t tokens) {
  const int64_t blocks = (tokens + kBlock - 1) / kBlock;
  std::vector<PPOSums> parts(blocks, PPOSums{});
  parallel_rows(blocks, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      parts[b] = fill_block(job, b * kBlock, (b + 1) * kBlock < tokens ? (b + 1) * kBlock : tokens);
  });
  PPOSums sums{};
  for (const PPOSums& part : parts) sums = ppo_merge(sums, part);
  return sums;
}

// ---- entry points ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss_cpu(Tensor logprobs, Tensor old_logprobs, Tensor advantages,
                                                                        Tensor vpreds, Tensor values, Tensor returns, Tensor mask,
                                                                        double cliprange, double cliprange_value,
                                                                        double vf_coef, double ratio_threshold) {
  check_ppo_coefficients(cliprange, cliprange_value, vf_coef);
  check_ppo_loss(logprobs, {&old_logprobs, &advantages, &vpreds, &values, &returns}, mask);
  const ScalarType dtype = logprobs.scalar_type();
  Tensor loss = new_tensor(logprobs, {}, dtype), stats = new_tensor(logprobs, {kPPOStats}, dtype);
  const auto like = [&] { return new_token_tensor(logprobs, logprobs.dim(), dtype); };
  Tensor ratio = like(), counted_advantages = like(), grad_logprobs = like(), grad_vpreds = like();
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const Job<A> job{pointer<A>(logprobs), pointer<A>(old_logprobs), pointer<A>(advantages),    pointer<A>(vpreds),
                     pointer<A>(values),   pointer<A>(returns),      pointer<bool>(mask),       pointer<A>(ratio),
                     pointer<A>(counted_advantages), pointer<A>(grad_logprobs), pointer<A>(grad_vpreds), A(cliprange), A(cliprange_value), A(vf_coef)};
    ppo_write_stats(sum_all(job, logprobs.numel()), vf_coef, ratio_threshold, pointer<A>(stats), pointer<A>(loss));
  };
  dtype == ScalarType::Double ? run(0.0) : run(0.0f);
  return {loss, stats, ratio, counted_advantages, grad_logprobs, grad_vpreds};
}

template <class A>
void scale_gradients(const Tensor& grad_loss, const Tensor& stats, const Tensor& grad_logprobs, const Tensor& grad_vpreds,
                     const Tensor& out_logprobs, const Tensor& out_vpreds) {
  const A grad_scale = pointer<A>(stats)[kGradScale], scale = *pointer<A>(grad_loss) * grad_scale;
  const A *a = pointer<A>(grad_logprobs), *b = pointer<A>(grad_vpreds);
  A *x = pointer<A>(out_logprobs), *y = pointer<A>(out_vpreds);
  parallel_rows(grad_logprobs.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      x[i] = scaled_gradient(a[i], scale, grad_scale);
      y[i] = scaled_gradient(b[i], scale, grad_scale);
    }
  });
}

std::tuple<Tensor, Tensor> ppo_loss_backward_cpu(Tensor grad_loss, Tensor stats, Tensor grad_logprobs, Tensor grad_vpreds) {
  check_ppo_loss_backward(grad_loss, stats, grad_logprobs, grad_vpreds, kPPOStats);
  Tensor out_logprobs = new_token_tensor(grad_logprobs, grad_logprobs.dim(), grad_logprobs.scalar_type());
  Tensor out_vpreds = new_token_tensor(grad_vpreds, grad_vpreds.dim(), grad_vpreds.scalar_type());
  const auto f = grad_logprobs.scalar_type() == ScalarType::Double ? scale_gradients<double> : scale_gradients<float>;
  f(grad_loss, stats, grad_logprobs, grad_vpreds, out_logprobs, out_vpreds);
  return {out_logprobs, out_vpreds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_ext, CPU, m) {
  m.impl("_ppo_loss", TORCH_BOX(&ppo_loss_cpu));
  m.impl("_ppo_loss_backward", TORCH_BOX(&ppo_loss_backward_cpu));
}

}  // namespace ppo_ext
