// ppo_loss_options_entry.h: the operators _ppo_loss_options and _ppo_loss_options_backward without their loops, as in
//                           ppo_loss_entry.h.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "ppo_loss_options_sums.h"

namespace ppo_ext {

// Of logprobs, vpreds and entropy; null where there is none.
constexpr int kPPOGradients = 3;

template <class A>
struct PPOOptionsBackwardJob {
  const A *grad_loss, *stats;
  const A* grads[kPPOGradients];
  A* out[kPPOGradients];
  int64_t tokens;
};

// ---- checks ----

// `numbers`: NUMBERS and then CHOICES of ppo_ext/ops/_ppo_options.py, which checks their ranges and combinations. They are
// one list because torch converts its entries faster than numbers that are arguments of their own.
inline PPOOptions ppo_options_of(const std::vector<double>& numbers) {
  PPOOptions options{};
  double* const fields[] = {&options.clip_low,
                            &options.clip_high,
                            &options.cliprange_value,
                            &options.vf_coef,
                            &options.ratio_threshold,
                            &options.dual_clip,
                            &options.log_ratio_clamp,
                            &options.kl_coef,
                            &options.entropy_coef,
                            &options.huber_delta,
                            &options.norm_length,
                            &options.denominator,
                            &options.scale};
  const std::pair<int*, int> choices[] = {
      {&options.ratio_level, kPPORatioLevels},   {&options.policy_loss, kPPOPolicyLosses},
      {&options.kl_estimator, kPPOKLEstimators}, {&options.kl_gradient, kPPOKLGradients},
      {&options.value_loss, kPPOValueLosses},    {&options.aggregation, kPPOAggregations}};
  if (numbers.size() != std::size(fields) + std::size(choices))
    reject("ppo_loss", "numbers", "have 19 entries", numbers.size());
  const double* next = numbers.data();
  for (double* field : fields) {
    if (*next != *next) reject("ppo_loss", "numbers", "be numbers", *next);
    *field = *next++;
  }
  for (const auto& [field, limit] : choices) {
    if (!(*next >= 0 && *next < limit && *next == int(*next)))
      reject("ppo_loss", "numbers", "end with the numbers of names", *next);
    *field = int(*next++);
  }
  return options;
}

// Those that are given must be tensors of tokens as `like` is.
inline void require_given(const Tensor& like,
                          std::initializer_list<std::pair<const char*, const std::optional<Tensor>&>> tensors) {
  const int64_t dims = like.dim();
  const ScalarType dtype = like.scalar_type();
  for (const auto& [name, x] : tensors)
    if (x) require_token_tensor("ppo_loss", name, *x, like, dims, dtype);
}

inline void require_critic(const std::optional<Tensor>& vpreds, const std::optional<Tensor>& values,
                           const std::optional<Tensor>& returns) {
  if (bool(vpreds) != bool(values)) reject("ppo_loss", "values", "be given with vpreds", "one of the two");
  if (bool(vpreds) != bool(returns)) reject("ppo_loss", "returns", "be given with vpreds", "one of the two");
}

// ---- the operators ----

// Returns loss, stats, the advantages and ratios of the tokens that count as [2, ...], and as [1 to 3, ...] the gradients of
// logprobs, vpreds and entropy, as far as these are given: new tensors take a good part of a small call.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss_options(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const std::optional<Tensor>& vpreds,
    const std::optional<Tensor>& values, const std::optional<Tensor>& returns, const Tensor& mask,
    const std::optional<Tensor>& weights, const std::optional<Tensor>& ref_logprobs,
    const std::optional<Tensor>& entropy, const std::optional<Tensor>& denominator,
    const std::optional<Tensor>& row_counts, const std::vector<double>& numbers) {
  const PPOOptions options = ppo_options_of(numbers);
  require_float_or_double("ppo_loss", "logprobs", logprobs);
  require_token_tensors_like("ppo_loss", logprobs,
                             {{"logprobs", logprobs}, {"old_logprobs", old_logprobs}, {"advantages", advantages}});
  require_critic(vpreds, values, returns);
  require_given(logprobs, {{"vpreds", vpreds},
                           {"values", values},
                           {"returns", returns},
                           {"weights", weights},
                           {"ref_logprobs", ref_logprobs},
                           {"entropy", entropy}});
  require_mask("ppo_loss", mask, logprobs, logprobs.dim());
  const ScalarType dtype = logprobs.scalar_type();
  const int64_t row_length = logprobs.dim() == 0 ? 1 : logprobs.size(logprobs.dim() - 1);
  const int64_t rows = row_length == 0 ? 0 : logprobs.numel() / row_length;
  if (denominator) require_entries("ppo_loss", "denominator", *denominator, 1, logprobs, dtype);
  if (row_counts && row_length > 0) require_entries("ppo_loss", "row_counts", *row_counts, rows, logprobs, dtype);
  PPOGiven given{};
  given.dual_clip = options.dual_clip > 0;
  given.weights = bool(weights);
  given.ref_logprobs = bool(ref_logprobs);
  given.entropy = bool(entropy);
  given.row_kl = ref_logprobs && options.by_row();
  given.row_entropy = entropy && options.by_row();
  Tensor loss = new_tensor(logprobs, {}, dtype), stats = new_tensor(logprobs, {ppo_option_stats(given)}, dtype);
  Tensor of_tokens = new_rows_like(logprobs, 2), grads = new_rows_like(logprobs, 1 + bool(vpreds) + bool(entropy));
  dispatch_floats(dtype, [&](auto zero) {
    using A = decltype(zero);
    PPOOptionsJob<A> job{};
    job.logprobs = pointer<A>(logprobs);
    job.old_logprobs = pointer<A>(old_logprobs);
    job.advantages = pointer<A>(advantages);
    job.vpreds = pointer<A>(vpreds);
    job.values = pointer<A>(values);
    job.returns = pointer<A>(returns);
    job.mask = pointer<bool>(mask);
    job.weights = pointer<A>(weights);
    job.ref_logprobs = pointer<A>(ref_logprobs);
    job.entropy = pointer<A>(entropy);
    job.given = given;
    job.denominator = pointer<A>(denominator);
    job.row_counts = pointer<A>(row_counts);
    job.tokens = logprobs.numel();
    job.counted_advantages = pointer<A>(of_tokens);
    job.ratio = job.counted_advantages + job.tokens;
    job.grad_logprobs = pointer<A>(grads);
    job.grad_vpreds = vpreds ? job.grad_logprobs + job.tokens : nullptr;
    job.grad_entropy = entropy ? job.grad_logprobs + (vpreds ? 2 : 1) * job.tokens : nullptr;
    job.stats = pointer<A>(stats);
    job.loss = pointer<A>(loss);
    job.rows = rows;
    job.row_length = row_length;
    job.options = options;
    Backend::forward(job, logprobs);
  });
  return {loss, stats, of_tokens, grads};
}

// `grads` is that of the forward pass, with a critic or without.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> ppo_loss_options_backward(const Tensor& grad_loss, const Tensor& stats,
                                                             const Tensor& grads, bool critic, bool needs_vpreds,
                                                             bool needs_entropy) {
  require_float_or_double("ppo_loss", "grads", grads);
  const ScalarType dtype = grads.scalar_type();
  const int64_t least = 1 + (critic || needs_vpreds) + needs_entropy;
  if (grads.dim() == 0 || grads.size(0) < least || grads.size(0) > kPPOGradients)
    reject("ppo_loss", "grads", "have the shape [" + std::to_string(least) + ", ...]", shape_text(grads));
  require_token_tensors_like("ppo_loss", grads, {{"grads", grads}});
  require_entries("ppo_loss", "grad_loss", grad_loss, 1, grads, dtype);
  if (stats.numel() < kPPOStats) reject("ppo_loss", "stats", "have 17 entries or more", stats.numel());
  require_entries("ppo_loss", "stats", stats, stats.numel(), grads, dtype);
  const auto new_grad = [&](bool needed) { return needed ? new_row_of(grads) : new_tensor(grads, {0}, dtype); };
  Tensor out_logprobs = new_grad(true), out_vpreds = new_grad(needs_vpreds), out_entropy = new_grad(needs_entropy);
  dispatch_floats(dtype, [&](auto zero) {
    using A = decltype(zero);
    PPOOptionsBackwardJob<A> job{};
    job.tokens = grads.numel() / grads.size(0);
    job.grad_loss = pointer<A>(grad_loss);
    job.stats = pointer<A>(stats);
    job.grads[0] = pointer<A>(grads);
    job.grads[1] = needs_vpreds ? job.grads[0] + job.tokens : nullptr;
    job.grads[2] = needs_entropy ? job.grads[0] + (critic ? 2 : 1) * job.tokens : nullptr;
    job.out[0] = pointer<A>(out_logprobs);
    job.out[1] = pointer<A>(out_vpreds);
    job.out[2] = pointer<A>(out_entropy);
    Backend::backward(job, grads);
  });
  return {out_logprobs, out_vpreds, out_entropy};
}

}  // namespace ppo_ext
