"""TRL 0.11.4, the last release with the classic trainer: its functions as published, and each with torch.compile."""

import types

import torch

from .. import trl_baseline
from ..suite import compiled
from ..trl_baseline import COMPILED, NAME, UPCAST, UPCAST_COMPILED
from . import Offer, Peer, installed
from .excerpt import excerpt

OPS = (
    "logprobs",
    "logprobs_and_entropy",
    "full_kl",
    "kl_rewards",
    "gae",
    "gae+masked_whiten",
    "masked_whiten",
    "ppo_loss",
    "loss_head",
)
_UNROLLED = {"forward": "torch.compile unrolls the loop over tokens; compiling takes minutes"}
_GRAPH_BREAKS = {"forward": "torch.compile unrolls the loop over rows, with a graph break in each"}


def _both(function, *, instead=None):
    """The offers of a function, eager and compiled."""
    return {NAME: Offer(function), COMPILED: Offer(compiled(function), compiled=True, instead=instead or {})}


def _with_upcast(function):
    """The offers of a function, eager and compiled, and both on float32 copies. TRL's value-head models return
    `logits.float()`, and only on those are low-precision results as accurate as ours."""

    def upcast(*arguments):
        return function(*(x.float() if x.is_floating_point() else x for x in arguments))

    return {
        **_both(function),
        UPCAST: Offer(upcast, low_precision=True),
        UPCAST_COMPILED: Offer(compiled(upcast), compiled=True, low_precision=True),
    }


def _gae_alone(trl):
    """The loop of `compute_advantages` without the whitening that follows it."""
    loop = excerpt(
        trl.PPOTrainer.compute_advantages,
        "lastgaelam = 0",
        "returns = advantages + values",
        inputs=("self", "values", "rewards", "mask"),
        outputs=("advantages", "returns"),
    )
    settings = types.SimpleNamespace(config=types.SimpleNamespace(whiten_rewards=False, gamma=1.0, lam=0.95))
    return lambda values, rewards, mask: loop(settings, values, rewards, mask)


def _loss_head(trl):
    """The loss head of `batched_forward_pass` and `train_minibatch`, on float32 logits as TRL's models return them."""

    def loss(logits, labels, old_logprobs, advantages, vpreds, values, returns, mask):
        logits = logits.float()[:, :-1]
        logprobs = trl.logprobs_from_logits(logits, labels[:, :-1])
        old_logprobs, advantages, vpreds, values, returns, mask = (
            x[:, :-1] for x in (old_logprobs, advantages, vpreds, values, returns, mask)
        )
        pg_loss, vf_loss, _ = trl.loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
        return pg_loss + vf_loss

    return {NAME: Offer(_gradients(loss)), COMPILED: Offer(_gradients(compiled(loss)), compiled=True)}


def _gradients(loss):
    """A function that returns the gradients of logits and vpreds."""

    def gradients(logits, labels, vpreds, **per_token):
        logits, vpreds = (x.detach().requires_grad_() for x in (logits, vpreds))
        return torch.autograd.grad(loss(logits, labels, vpreds=vpreds, **per_token), (logits, vpreds))

    return gradients


def _load(device):
    trl = trl_baseline.functions()

    def logprobs(logits, labels):
        return trl.logprobs_from_logits(logits[None], labels[None])[0]  # TRL takes [B, T, V]

    def logprobs_and_entropy(logits, labels):
        return logprobs(logits, labels), trl.entropy_from_logits(logits)

    def full_kl(logits, ref_logits):
        log_p, log_q = (trl.logprobs_from_logits(x[None], None, gather=False)[0] for x in (logits, ref_logits))
        return trl.kl_penalty(log_p, log_q)

    def gae_and_whiten(values, rewards, mask):
        return trl.compute_advantages(values, rewards, mask)[1:]

    def ppo_loss(logprobs, old_logprobs, advantages, vpreds, values, returns, mask):
        pg_loss, vf_loss, stats = trl.loss_without_entropy(
            old_logprobs, values, logprobs, vpreds, logprobs, mask, advantages, returns
        )
        return pg_loss + vf_loss, stats

    return {
        "logprobs": _with_upcast(logprobs),
        "logprobs_and_entropy": _with_upcast(logprobs_and_entropy),
        "full_kl": _with_upcast(full_kl),
        "kl_rewards": _both(trl.compute_rewards, instead=_GRAPH_BREAKS),
        "gae": _both(_gae_alone(trl), instead=_UNROLLED),
        "gae+masked_whiten": _both(gae_and_whiten, instead=_UNROLLED),
        "masked_whiten": _both(trl.masked_whiten),
        "ppo_loss": _both(ppo_loss),
        "loss_head": _loss_head(trl),
    }


PEER = Peer(NAME, OPS, "pip install trl==0.11.4 rich", _load, installed("trl"))
