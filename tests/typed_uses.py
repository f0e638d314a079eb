"""What a type checker must accept and refuse; `make lint` runs mypy over this file, nothing imports it.

A line that is wrong on purpose carries the error that mypy must report there. Where mypy reports none, it reports the
unused `type: ignore` instead, so this file is clean only if every wrong use is refused.
"""

import torch

import ppo_ext
from ppo_ext import PPOConfig, PPOTrainer, gae


def right(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logprobs, entropy = ppo_ext.logprobs_and_entropy(logits, labels, temperature=0.7, mask=mask)
    kl = ppo_ext.full_kl(logits, logits.detach(), mask=mask)
    scores = torch.zeros(len(logprobs))
    rewards, _, kls = ppo_ext.kl_rewards(scores, logprobs, logprobs, mask, kl_coef=0.1, kl_penalty="abs")
    advantages, returns = gae(entropy, rewards, mask, gamma=1, lam=0.95)
    advantages = ppo_ext.masked_whiten(advantages, mask, shift_mean=False)
    loss, stats = ppo_ext.ppo_loss(logprobs, logprobs, advantages, kl, kls, returns, mask, cliprange=0.1)
    tokens = (logprobs, advantages, None, None, None, mask)
    ppo_ext.ppo_loss_from_logits(
        logits, labels, *tokens, cliprange=(0.2, 0.3), ratio_level="sequence", denominator=mask.sum()
    )
    ppo_ext.ppo_loss_from_hidden(
        logits, logits, labels, *tokens, ref_logprobs=kl, kl_coef=0.1, kl_estimator="k3", scale=2
    )
    return loss + ppo_ext.masked_mean(kl, mask) + stats["loss/total"]


def config() -> PPOConfig:
    return PPOConfig(batch_size=8, mini_batch_size=2, kl_penalty="full", max_grad_norm=None)


def step(trainer: PPOTrainer, ids: list[torch.Tensor]) -> float:
    responses = trainer.generate(ids, return_prompt=False, max_new_tokens=4)
    return trainer.step(ids, responses, [torch.tensor(1.0)])["ppo/loss/total"]


def wrong(x: torch.Tensor) -> None:
    from ppo_ext import PPOTrainr  # type: ignore[attr-defined]  # noqa: F401

    ppo_ext.no_such_op(x)  # type: ignore[attr-defined]
    gae(x, rewards="oops")  # type: ignore[arg-type]
    ppo_ext.logprobs(x)  # type: ignore[call-arg]
    ppo_ext.masked_whiten(x, x, mean=True)  # type: ignore[call-arg]
    ppo_ext.ppo_loss(x, x, x, x, x, x, x, 0.2)  # type: ignore[call-arg]
    ppo_ext.ppo_loss_from_logits(x, x, x, x, None, None, None, x, aggregation="mean")  # type: ignore[arg-type]
    PPOConfig(batch_sise=3)  # type: ignore[call-arg]
