"""Plain torch: its fastest expression for an op, where that is not the one of TRL."""

import torch

from ..cases import GAMMA, LAM
from ..suite import compiled
from . import Offer, Peer


def gather_minus_logsumexp(logits, labels):
    """The shortest expression in plain torch for float32. TRL uses it since 0.15, in a loop over rows."""
    return logits.gather(-1, labels[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)


def triangular_product(values, rewards, mask):
    """GAE as the product of the deltas with the triangular matrix of (gamma*lam)^(k - t)."""
    values, rewards = values * mask, rewards * mask
    delta = rewards + GAMMA * torch.nn.functional.pad(values, (0, 1))[:, 1:] - values
    position = torch.arange(values.shape[1], device=values.device)
    steps = (position[:, None] - position[None, :]).to(values.dtype)
    weights = torch.where(steps >= 0, (GAMMA * LAM) ** steps.clamp(min=0), 0.0)
    advantages = delta @ weights
    return advantages, advantages + values


def cross_entropy_of_linear(hidden, weight, labels):
    return -torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")


def chunks_of_linear(hidden, weight, labels):
    """torch's own, since 2.12: the gradients are made with the loss, some rows at a time."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)


def _load(device):
    linear = {"torch linear + cross_entropy": Offer(cross_entropy_of_linear)}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        linear["torch linear_cross_entropy, in chunks"] = Offer(chunks_of_linear)
    return {
        "logprobs": {"torch gather - logsumexp": Offer(gather_minus_logsumexp)},
        "gae": {
            "torch, one matrix product": Offer(triangular_product),
            "torch, one matrix product, compiled": Offer(compiled(triangular_product), compiled=True),
        },
        "linear_logprobs": linear,
    }


PEER = Peer("torch", ("logprobs", "gae", "linear_logprobs"), "pip install torch", _load, lambda: torch.__version__)
