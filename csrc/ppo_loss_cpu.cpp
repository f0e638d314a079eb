// ppo_loss_cpu.cpp
// Computes  see ppo_loss.h
// Bytes     37 per token in fp32: six inputs, the mask, the ratio and two gradients
// Launch    threads over blocks of 8192 tokens
// Sums      fp64 within a block, then over blocks in their order: same bits for any threads
// Limits    none

#include <vector>

#include "checks.h"
#include "parallel.h"
#include "ppo_loss.h"
#include "whiten.h"

namespace ppo_ext {
namespace {

constexpr int64_t kBlock = 8192;

struct Partial {
  double count, pg, vf, approxkl, policykl, clipfrac, advantage, ratio, vpred, error, vf_clipfrac;
  Moments<double> returns, values;
};

template <class A>
struct Job {
  const A *logprobs, *old_logprobs, *advantages, *vpreds, *values, *returns;
  const bool* mask;
  A *ratio, *grad_logprobs, *grad_vpreds;
  A cliprange, cliprange_value, vf_coef;
};

template <class A>
PPOToken<A> token(const Job<A>& job, int64_t i) {
  return {job.logprobs[i], job.old_logprobs[i], job.advantages[i], job.vpreds[i], job.values[i], job.returns[i]};
}

template <class A>
void add(Partial& sums, const PPOToken<A>& x, const PPOTerms<A>& terms) {
  const double d = double(x.logprob) - x.old_logprob, error = double(x.vpred) - x.ret;
  sums.count += 1;
  sums.pg += terms.pg;
  sums.vf += terms.vf;
  sums.approxkl += 0.5 * d * d;
  sums.policykl -= d;
  sums.clipfrac += terms.pg_clipped;
  sums.advantage += x.advantage;
  sums.ratio += terms.ratio;
  sums.vpred += x.vpred;
  sums.error += error * error;
  sums.vf_clipfrac += terms.vf_clipped;
}

void merge(Partial& a, const Partial& b) {
  a.count += b.count;
  a.pg += b.pg;
  a.vf += b.vf;
  a.approxkl += b.approxkl;
  a.policykl += b.policykl;
  a.clipfrac += b.clipfrac;
  a.advantage += b.advantage;
  a.ratio += b.ratio;
  a.vpred += b.vpred;
  a.error += b.error;
  a.vf_clipfrac += b.vf_clipfrac;
  a.returns = moments_merge(a.returns, b.returns);
  a.values = moments_merge(a.values, b.values);
}

// Mean and squared distances from it, over the tokens [begin, end) that count.
template <class A>
Moments<double> block_moments(const A* x, const bool* mask, int64_t begin, int64_t end, double count) {
  double sum = 0, m2 = 0;
  for (int64_t i = begin; i < end; ++i) sum += mask[i] ? x[i] : 0;
  const double mean = count == 0 ? 0 : sum / count;
  for (int64_t i = begin; i < end; ++i) {
    const double gap = mask[i] ? x[i] - mean : 0;
    m2 += gap * gap;
  }
  return {count, mean, m2};
}

// Fills the per-token results of tokens [begin, end) and returns their sums.
template <class A>
Partial fill_block(const Job<A>& job, int64_t begin, int64_t end) {
  Partial sums{};
  for (int64_t i = begin; i < end; ++i) {
    if (!job.mask[i]) {
      job.ratio[i] = job.grad_logprobs[i] = job.grad_vpreds[i] = A(0);
      continue;
    }
    const PPOToken<A> x = token(job, i);
    const PPOTerms<A> terms = ppo_terms(x, job.cliprange, job.cliprange_value);
    job.ratio[i] = terms.ratio;
    job.grad_logprobs[i] = terms.grad_logprob;
    job.grad_vpreds[i] = job.vf_coef * terms.grad_vpred;
    add(sums, x, terms);
  }
  sums.returns = block_moments(job.returns, job.mask, begin, end, sums.count);
  sums.values = block_moments(job.values, job.mask, begin, end, sums.count);
  return sums;
}

template <class A>
void write_stats(const Partial& sums, double vf_coef, double ratio_threshold, A* stats, A* loss) {
  const double scale = sums.count > 0 ? 1.0 / sums.count : 0.0;
  const bool skipped = sums.ratio * scale > ratio_threshold;
  const double pg = skipped ? 0.0 : sums.pg * scale, vf = skipped ? 0.0 : sums.vf * scale;
  const auto var = [&](const Moments<double>& m) { return A(unbiased_var(m.weight, biased_var(m))); };
  stats[kLossPolicy] = A(pg);
  stats[kLossValue] = A(vf);
  stats[kLossTotal] = *loss = A(pg + vf_coef * vf);
  stats[kApproxKL] = A(sums.approxkl * scale);
  stats[kPolicyKL] = A(sums.policykl * scale);
  stats[kClipFrac] = A(sums.clipfrac * scale);
  stats[kAdvantagesMean] = A(sums.advantage * scale);
  stats[kRatioMean] = A(sums.ratio * scale);
  stats[kSkipped] = A(skipped);
  stats[kReturnsMean] = A(sums.returns.mean);
  stats[kReturnsVar] = var(sums.returns);
  stats[kVPred] = A(sums.vpred * scale);
  stats[kValError] = A(sums.error * scale);
  stats[kValClipFrac] = A(sums.vf_clipfrac * scale);
  stats[kValMean] = A(sums.values.mean);
  stats[kValVar] = var(sums.values);
  stats[kGradScale] = A(skipped ? 0.0 : scale);
}

template <class A>
Partial sum_all(const Job<A>& job, int64_t tokens) {
  const int64_t blocks = (tokens + kBlock - 1) / kBlock;
  std::vector<Partial> parts(blocks, Partial{});
  parallel_rows(blocks, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      parts[b] = fill_block(job, b * kBlock, (b + 1) * kBlock < tokens ? (b + 1) * kBlock : tokens);
  });
  Partial sums{};
  for (const Partial& part : parts) merge(sums, part);
  return sums;
}

// ---- entry points ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss_cpu(Tensor logprobs, Tensor old_logprobs, Tensor advantages,
                                                                Tensor vpreds, Tensor values, Tensor returns, Tensor mask,
                                                                double cliprange, double cliprange_value, double vf_coef,
                                                                double ratio_threshold) {
  check_ppo_loss(logprobs, {&old_logprobs, &advantages, &vpreds, &values, &returns}, mask);
  const ScalarType dtype = logprobs.scalar_type();
  Tensor loss = new_tensor(logprobs, {}, dtype), stats = new_tensor(logprobs, {kPPOStats}, dtype);
  const auto like = [&] { return new_token_tensor(logprobs, logprobs.dim(), dtype); };
  Tensor ratio = like(), grad_logprobs = like(), grad_vpreds = like();
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const Job<A> job{pointer<A>(logprobs), pointer<A>(old_logprobs), pointer<A>(advantages),    pointer<A>(vpreds),
                     pointer<A>(values),   pointer<A>(returns),      pointer<bool>(mask),       pointer<A>(ratio),
                     pointer<A>(grad_logprobs), pointer<A>(grad_vpreds), A(cliprange), A(cliprange_value), A(vf_coef)};
    write_stats(sum_all(job, logprobs.numel()), vf_coef, ratio_threshold, pointer<A>(stats), pointer<A>(loss));
  };
  dtype == ScalarType::Double ? run(0.0) : run(0.0f);
  return {loss, stats, ratio, grad_logprobs, grad_vpreds};
}

template <class A>
void scale_gradients(const Tensor& grad_loss, const Tensor& stats, const Tensor& grad_logprobs, const Tensor& grad_vpreds,
                     const Tensor& out_logprobs, const Tensor& out_vpreds) {
  const A grad_scale = pointer<A>(stats)[kGradScale], scale = *pointer<A>(grad_loss) * grad_scale;
  const A *a = pointer<A>(grad_logprobs), *b = pointer<A>(grad_vpreds);
  A *x = pointer<A>(out_logprobs), *y = pointer<A>(out_vpreds);
  parallel_rows(grad_logprobs.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      x[i] = grad_scale == A(0) ? A(0) : scale * a[i];  // a skipped minibatch may hold inf
      y[i] = grad_scale == A(0) ? A(0) : scale * b[i];
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
