"""The mutants: a wrong change of text each, and the tests that must fail with it.

Several of them are faults that other libraries have had.
"""

import dataclasses

PYTHON, CPU, CUDA = "Python", "CPU", "CUDA on the host"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """In `file`, the text `right`, which must occur once, is replaced by `wrong`. `side`: whether the Python package,
    the CPU library or the CUDA kernels are run with it. `tests`: the test files; `selection`: which of their tests."""

    name: str
    side: str
    file: str
    right: str
    wrong: str
    tests: str
    selection: str = ""


MUTANTS = (
    # ---- the formulas, which CPU and CUDA share ----
    Mutant(
        "the policy loss is not clipped",
        CPU,
        "csrc/ppo_loss.h",
        "out.pg = max_or_nan(pg1, pg2);",
        "out.pg = pg1;",
        "test_ppo_loss.py",
    ),
    Mutant(
        "the clip is counted after the larger term was taken",
        CPU,
        "csrc/ppo_loss.h",
        "out.pg_clipped = pg2 > pg1 ? one : zero;",
        "out.pg_clipped = pg2 > out.pg ? one : zero;",
        "test_ppo_loss.py",
    ),
    Mutant(
        "the gradient ignores the clip",
        CPU,
        "csrc/ppo_loss.h",
        "ratio >= low && ratio <= high ? one - share : zero;",
        "one - share;",
        "test_ppo_loss.py",
    ),
    Mutant(
        "the smaller of the two value errors",
        CPU,
        "csrc/ppo_loss.h",
        "Number<A>::of(0.5) * max_or_nan(vf1, vf2);",
        "Number<A>::of(0.5) * min_or_nan(vf1, vf2);",
        "test_ppo_loss.py",
    ),
    Mutant(
        "a tie of two terms gives the first the whole gradient",
        CPU,
        "csrc/common/host_device.h",
        "(a == b ? Number<A>::of(0.5) : Number<A>::of(0))",
        "(a == b ? Number<A>::of(1) : Number<A>::of(0))",
        "test_ppo_loss.py",
    ),
    Mutant(
        "a skipped mini batch keeps its gradient",
        CPU,
        "csrc/ppo_loss.h",
        "stats[kGradScale] = skipped ? A(0) : A(scale);",
        "stats[kGradScale] = A(scale);",
        "test_ppo_loss.py",
    ),
    Mutant(
        "the KL estimate with its sign swapped",
        CPU,
        "csrc/kl_rewards.h",
        "const A d = logprob - ref_logprob;",
        "const A d = ref_logprob - logprob;",
        "test_kl_rewards.py",
    ),
    Mutant(
        "parts of a batch are averaged without their sizes",
        CPU,
        "csrc/common/moments.h",
        "a.mean + gap * part",
        "a.mean + gap * 0.5",
        "test_masked.py test_ppo_loss.py",
    ),
    Mutant(
        "the variance is the biased one",
        CPU,
        "csrc/common/moments.h",
        "biased * weight / (weight - 1)",
        "biased",
        "test_masked.py",
    ),
    Mutant(
        "the temperature is dropped in the backward pass",
        CPU,
        "csrc/logprobs.h",
        "return {-inv_temperature * (grad_logprob + grad_entropy * entropy), inv_temperature * grad_entropy};",
        "return {-(grad_logprob + grad_entropy * entropy), grad_entropy};",
        "test_logprobs.py",
    ),
    Mutant(
        "the entropy's gradient of the label's column",
        CPU,
        "csrc/logprobs.h",
        "grad_entropy * p * (logprob + entropy)",
        "grad_entropy * p * logprob",
        "test_logprobs.py",
    ),
    Mutant(
        "the divergence is not shifted with its maximum",
        CPU,
        "csrc/full_kl.h",
        "state.weighted + (shift - ref_shift) * state.sum",
        "state.weighted",
        "test_full_kl.py",
    ),
    Mutant(
        "lambda decays the next value too",
        CPU,
        "csrc/gae.h",
        "return delta + gamma_lam * next_advantage;",
        "return gamma_lam * (delta + next_advantage);",
        "test_gae.py",
    ),
    # ---- the CPU's loops ----
    Mutant(
        "the score falls on the padding",
        CPU,
        "csrc/kl_rewards_cpu.cpp",
        "if (last >= 0) job.rewards[last]",
        "if (last >= 0) job.rewards[(b + 1) * job.T - 1]",
        "test_kl_rewards.py",
    ),
    Mutant(
        "advantages decay through masked tokens",
        CPU,
        "csrc/gae_simd.cpp",
        "counts ? carry.advantage : before.advantage}",
        "carry.advantage}",
        "test_gae.py",
    ),
    Mutant(
        "an entropy of blocks with different origins",
        CPU,
        "csrc/logprobs_simd.cpp",
        "factor * (row_sums.weighted.lanes + shift * row_sums.sum.lanes)",
        "factor * row_sums.weighted.lanes",
        "test_logprobs.py",
    ),
    Mutant(
        "a -inf logit makes the divergence NaN",
        CPU,
        "csrc/full_kl_simd.cpp",
        "kInfinityIsPossible && e.value() == splat(0.0f) ? splat(0.0f) : e.value() * gap",
        "e.value() * gap",
        "test_full_kl.py",
    ),
    Mutant(
        "masked values are multiplied instead of selected",
        CPU,
        "csrc/masked_simd.cpp",
        "moments.add(w == Number<V>::of(0) ? Number<V>::of(0) : x, w);",
        "moments.add(x, w);",
        "test_masked.py",
    ),
    Mutant(
        "masked tokens are read into the loss",
        CPU,
        "csrc/ppo_loss_simd.cpp",
        "return counts ? entries : Number<V>::of(0);",
        "return entries;",
        "test_ppo_loss.py",
    ),
    Mutant(
        "a masked token adds a ratio of 1 to the sums",
        CPU,
        "csrc/ppo_loss_simd.cpp",
        "counts ? ratio_of(x.logprob, x.old_logprob) : Number<V>::of(0);",
        "ratio_of(x.logprob, x.old_logprob);",
        "test_ppo_loss.py",
    ),
    Mutant(
        "a fold of blocks forgets the last",
        CPU,
        "csrc/ppo_loss_cpu.cpp",
        "for (const PPOSums& part : parts) sums = ppo_merge(sums, part);",
        "for (int64_t b = 0; b + 1 < blocks; ++b) sums = ppo_merge(sums, parts[b]);",
        "test_ppo_loss.py",
    ),
    # ---- the CUDA kernels ----
    Mutant(
        "the sums are not rescaled to a larger maximum",
        CUDA,
        "csrc/logprobs_cuda.cu",
        "if (top > state.max) state = softmax_rescale(state, top, inv_temperature);",
        "if (top > state.max) state.max = top;",
        "test_logprobs.py",
    ),
    Mutant(
        "the gradient of the entropy is relative to the wrong sum",
        CUDA,
        "csrc/logprobs_cuda.cu",
        "share * (row.alpha + row.beta * log_sum)",
        "share * row.alpha",
        "test_logprobs.py",
    ),
    Mutant(
        "0 times a reference's -inf",
        CUDA,
        "csrc/full_kl_cuda.cu",
        "weighted += e == A(0) ? A(0) : e * (y - ref_y);",
        "weighted += e * (y - ref_y);",
        "test_full_kl.py",
    ),
    Mutant(
        "the divergence is missing in its gradient",
        CUDA,
        "csrc/full_kl_cuda.cu",
        "((saved.ref_log_sum[n] - log_sum) - saved.kl[n])",
        "(saved.ref_log_sum[n] - log_sum)",
        "test_full_kl.py",
    ),
    Mutant(
        "a tile without tokens resets the next value",
        CUDA,
        "csrc/gae_cuda.cu",
        "if (values.total.found != A(0)) next_value = values.total.value;",
        "next_value = values.total.value;",
        "test_gae.py",
    ),
    Mutant(
        "advantages decay through masked tokens on CUDA",
        CUDA,
        "csrc/gae_cuda.cu",
        "if (counts) running = gae_step(delta[k], running, job.gamma_lam);",
        "running = gae_step(counts ? delta[k] : A(0), running, job.gamma_lam);",
        "test_gae.py",
    ),
    Mutant(
        "the score falls on the padding on CUDA",
        CUDA,
        "csrc/kl_rewards_cuda.cu",
        "t == last ? reward + job.scores[b]",
        "t == job.T - 1 ? reward + job.scores[b]",
        "test_kl_rewards.py",
    ),
    Mutant(
        "the last token is not shared with the other threads",
        CUDA,
        "csrc/kl_rewards_cuda.cu",
        "    last = share_first<kThreads>(last);\n",
        "",
        "test_kl_rewards.py",
    ),
    Mutant(
        "masked gradients are read into the sums",
        CUDA,
        "csrc/masked_cuda.cu",
        "    if (in.weights[i] == A(0)) continue;\n    sums.grad",
        "    sums.grad",
        "test_masked.py test_hostile_values.py",
    ),
    Mutant(
        "a whitened entry of weight 0 is not 0",
        CUDA,
        "csrc/masked_cuda.cu",
        "whitened[i] = in.weights[i] == A(0) ? A(0) : A(",
        "whitened[i] = A(",
        "test_masked.py",
    ),
    Mutant(
        "the policy KL with its sign swapped",
        CUDA,
        "csrc/ppo_loss.h",
        "out.policykl = d;",
        "out.policykl = -d;",
        "test_ppo_loss.py",
    ),
    Mutant(
        "a merged sum loses its first part",
        CUDA,
        "csrc/ppo_loss_cuda.cu",
        "int(threadIdx.x) < count ? parts[threadIdx.x] : PPOSums{}",
        "threadIdx.x > 0 && int(threadIdx.x) < count ? parts[threadIdx.x] : PPOSums{}",
        "test_ppo_loss.py",
    ),
    Mutant(
        "offsets of 32 bits",
        CUDA,
        "csrc/common/rows.h",
        "return dims > 0 ? result + n * strides[0] : result;",
        "return dims > 0 ? result + int32_t(n * strides[0]) : result;",
        "test_large.py",
    ),
    # ---- Python ----
    Mutant(
        "the advantages stand in for the mask",
        PYTHON,
        "ppo_ext/ops/ppo_loss.py",
        "for x in tensors), mask, *coefficients)",
        "for x in tensors), tensors[2] != 0, *coefficients)",
        "test_ppo_loss.py",
    ),
    Mutant(
        "the mask is applied after the recursion",
        PYTHON,
        "ppo_ext/ops/gae.py",
        "return _gae(values.contiguous(), rewards.contiguous(), mask, gamma, lam)",
        "found = _gae(values.contiguous(), rewards.contiguous(), None, gamma, lam)\n"
        "    return found if mask is None else tuple(x * mask for x in found)",
        "test_gae.py",
    ),
    Mutant(
        "the optimizer starts anew on resume",
        PYTHON,
        "ppo_ext/trainer/resume.py",
        '        self.optimizer.load_state_dict(_join_optimizer(tensors, state["optimizer"]))\n',
        "",
        "test_trainer_resume.py",
        "bit",
    ),
    Mutant(
        "each token is scored by its own logits",
        PYTHON,
        "ppo_ext/trainer/rollout.py",
        "pad(input_ids[:, 1:], (0, 1))",
        "pad(input_ids[:, :-1], (0, 1))",
        "test_trl_parity.py",
    ),
    Mutant(
        "policy and reference change places in the divergence",
        PYTHON,
        "ppo_ext/trainer/forward.py",
        "full_kl(logits, ref_logits, mask=mask)",
        "full_kl(ref_logits, logits, mask=mask)",
        "test_trl_parity.py",
    ),
    Mutant(
        "the KL controller pushes the wrong way",
        PYTHON,
        "ppo_ext/trainer/kl_controller.py",
        "self.value *= 1 + error * n_steps / self.horizon",
        "self.value *= 1 - error * n_steps / self.horizon",
        "test_trl_core.py test_trl_parity.py",
    ),
    Mutant(
        "the moments of the scores are one process's own",
        PYTHON,
        "ppo_ext/trainer/stats.py",
        'return self.accelerator.reduce(x.float().to(self.accelerator.device), reduction="sum")',
        "return x.float().to(self.accelerator.device)",
        "test_trainer_processes.py",
    ),
    Mutant(
        "the reference's probabilities receive gradients",
        PYTHON,
        "ppo_ext/ops/reference.py",
        "log_q = _log_softmax(ref_logits.detach(), counts, temperature)",
        "log_q = _log_softmax(ref_logits, counts, temperature)",
        "test_full_kl.py",
    ),
)

# Faults of other libraries that have no mutant here, and why.
NOT_APPLICABLE = {
    "whitening by the numbers of one process": "each process whitens its own batch, as TRL 0.11.4 does; the scores' "
    "moments, which are of all processes, have a mutant",
    "a mean of the means of accumulated minibatches": "TRL 0.11.4 and accelerate do that, and the parity tests keep it; "
    "the op's own merge of parts has a mutant",
    "k3 with its sign swapped": "no op has that estimator; those there are have mutants of their signs",
}
