"""Sampling from a policy, and the figures of its samples: gold metric, reward model score, KL, NLL and diversity."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...ops.logprobs import logprobs
from ...supervised.reward_scores import reward_scores
from ..figures import distinct_2, interval
from .gold import GoldMetric

SAMPLING_BATCH = 256


class Samples(NamedTuple):
    """Prompts and responses of equal lengths, as token ids."""

    prompts: torch.Tensor  # [N, P] int64
    responses: torch.Tensor  # [N, R] int64
    texts: list[str]  # the responses

    @property
    def sequences(self) -> torch.Tensor:
        return torch.cat([self.prompts, self.responses], dim=1)


def generation_kwargs(tokenizer: Any, response_tokens: int) -> dict:
    """Plain sampling at temperature 1, so that the sampled distribution is the one whose KL is measured."""
    return {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "min_new_tokens": response_tokens,
        "max_new_tokens": response_tokens,
        "pad_token_id": tokenizer.pad_token_id,
    }


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    prompts: list[torch.Tensor],
    response_tokens: int,
    on_batch: Callable[..., None] | None = None,
) -> Samples:
    """One response per prompt from a causal LM (or one with a value head), drawn with torch's global generator.

    on_batch: called with by=number of prompts after each batch.
    """
    stacked = torch.stack(prompts)
    device = next(model.parameters()).device
    generated = []
    for batch in stacked.split(SAMPLING_BATCH):
        batch = batch.to(device)
        output = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), **generation_kwargs(tokenizer, response_tokens)
        )
        generated.append(output[:, stacked.shape[1] :].cpu())
        if on_batch is not None:
            on_batch(by=len(batch))
    responses = torch.cat(generated)
    return Samples(stacked, responses, tokenizer.batch_decode(responses))


@torch.no_grad()
def response_logprobs(model: Any, samples: Samples) -> torch.Tensor:
    """Log-probabilities [N, R] of the responses under a causal LM."""
    device = next(model.parameters()).device
    start = samples.prompts.shape[1]
    parts = []
    for ids in samples.sequences.to(device).split(SAMPLING_BATCH):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        parts.append(logprobs(logits[:, start - 1 : -1], ids[:, start:]).cpu())
    return torch.cat(parts)


def evaluate(policy: Any, reference: Any, reward_model: Any, gold: GoldMetric, samples: Samples) -> dict[str, float]:
    """Means over samples that `policy` drew: gold with its 95 % interval, RM score, KL, reference NLL, distinct-2."""
    gold_scores = gold(samples.texts)
    ref_logprobs = response_logprobs(reference, samples)
    kl = (response_logprobs(policy, samples) - ref_logprobs).sum(dim=1)
    return {
        "gold": gold_scores.mean().item(),
        "gold_ci": interval(gold_scores),
        "rm_score": reward_scores(reward_model, list(samples.sequences)).mean().item(),
        "kl": kl.mean().item(),
        "ref_nll": -ref_logprobs.mean().item(),
        "distinct_2": distinct_2(samples.texts),
    }
