"""The figures of a policy on the held-out openings."""

import torch

from ..display import Display
from ..figures import distinct_2, interval
from ..folder import RunFolder
from .metrics import Metrics
from .settings import Settings
from .training import sample


@torch.no_grad()
def evaluate(stage, trainer, prompts: list[str], metrics: Metrics, settings: Settings, folder: RunFolder,
             display: Display) -> dict[str, float]:  # fmt: skip
    """Means over one response per held-out opening, with 95 % intervals; writes samples/<stage>.jsonl.

    The same openings and the same random numbers for each policy, so that the policies alone differ.
    """
    torch.manual_seed(settings.seed + 4)
    texts, kls, nll, tokens = [], [], 0.0, 0
    with display.bar("held-out openings", len(prompts)) as advance:
        for start in range(0, len(prompts), settings.batch):
            part = prompts[start : start + settings.batch]
            queries, responses, new_texts = sample(trainer, part, settings)
            logprobs, ref_logprobs, mask = _both_logprobs(trainer, queries, responses)
            texts += new_texts
            kls += (logprobs - ref_logprobs).sum(dim=1).tolist()  # both are 0 where the mask is 0
            nll -= ref_logprobs.sum().item()
            tokens += int(mask.sum())
            advance(by=len(part))
    reward, rating = metrics.reward(texts), metrics.rating(texts)
    folder.write_samples(stage, prompts, texts, reward=reward.tolist(), rating=rating.tolist())
    kl = torch.tensor(kls)
    return {
        "reward": reward.mean().item(),
        "reward_ci": interval(reward),
        "rating": rating.mean().item(),
        "rating_ci": interval(rating),
        "kl": kl.mean().item(),
        "kl_ci": interval(kl),
        "ref_nll": nll / tokens,
        "distinct_2": distinct_2(texts),
        "length": tokens / len(texts),
    }


def _both_logprobs(trainer, queries, responses):
    """(logprobs, ref_logprobs, mask), each [B, T-1], of the policy and of the same model with its adapter off."""
    inputs = trainer.prepare_model_inputs(queries, responses)
    logprobs, _, _, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    with trainer.optional_peft_ctx():
        ref_logprobs, _, _, _ = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    return logprobs, ref_logprobs, mask
