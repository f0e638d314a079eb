"""TRL 1.12, the last release with a PPO trainer: its shared functions, and statements of `PPOTrainer.train`."""

import functools
import types

import numpy
import torch

from ..cases import GAMMA, LAM
from ..trl_baseline import KL_COEF
from . import Offer, Peer, wheels
from .excerpt import excerpt

_WHEEL = "trl 1.12"
_ARGS = types.SimpleNamespace(
    gamma=GAMMA,
    lam=LAM,
    kl_estimator="k1",
    kl_coef=KL_COEF,
    cliprange=0.2,
    cliprange_value=0.2,
    vf_coef=0.1,
    temperature=1.0 - 1e-7,  # train() adds 1e-7 and divides in place, here by 1.0
)
SEQUENCES = 8  # the shared functions loop over the first dimension, which in a trainer is the sequences of a minibatch


def as_batch(x):
    """Rows [N, ...] as [sequences, tokens, ...]."""
    sequences = SEQUENCES if x.shape[0] % SEQUENCES == 0 else 1
    return x.view(sequences, x.shape[0] // sequences, *x.shape[1:])


@functools.lru_cache(maxsize=1)  # train() makes it once, so it is made outside the clock
def _padding(mask):
    """(padding_mask, the position of the last token of each sequence)."""
    return mask == 0, mask.shape[1] - 1 - mask.flip(1).argmax(1)


def _gae(train, *, whiten):
    inputs = ("args", "responses", "values", "rewards", *(("padding_mask",) if whiten else ()))
    last = "advantages = torch.masked_fill(" if whiten else "returns = advantages + values"
    statements = excerpt(train, "lastgaelam = 0", last, inputs=inputs, outputs=("advantages", "returns"))

    def gae(values, rewards, mask):
        padding_mask, _ = _padding(mask)
        # as train() does before these statements
        values, rewards = (torch.masked_fill(x, padding_mask, 0) for x in (values, rewards))
        return statements(_ARGS, values, values, rewards, *((padding_mask,) if whiten else ()))

    return gae


def _kl_rewards(train):
    statements = excerpt(
        train,
        "logr = ref_logprobs",
        "rewards[actual_start, actual_end]",
        inputs=("args", "logprobs", "ref_logprobs", "scores", "sequence_lengths", "sequence_lengths_p1"),
        outputs=("rewards", "non_score_reward", "kl"),
    )

    def kl_rewards(scores, logprobs, ref_logprobs, mask):
        # train() gives the score to the position after the last token; here that position is the last token, as in ours.
        padding_mask, last = _padding(mask)
        logprobs, ref_logprobs = (
            torch.masked_fill(x, padding_mask, train.__globals__["INVALID_LOGPROB"]) for x in (logprobs, ref_logprobs)
        )
        return statements(_ARGS, logprobs, ref_logprobs, scores, last, last)

    return kl_rewards


def _ppo_loss(train):
    statements = excerpt(
        train,
        "vpredclipped = torch.clamp(",
        "loss = pg_loss + ",
        inputs=(
            "args",
            "vpred",
            "mb_values",
            "mb_return",
            "mb_advantage",
            "new_logprobs",
            "mb_logprobs",
            "padding_mask",
            "padding_mask_p1",
            "micro_batch_inds",
        ),
        outputs=("loss", "pg_losses", "pg_losses2", "pg_loss", "vf_loss", "vf_clipfrac"),
    )
    masked_mean = train.__globals__["masked_mean"]

    def ppo_loss(logprobs, old_logprobs, advantages, vpreds, values, returns, mask):
        padding_mask, _ = _padding(mask)
        loss, pg_losses, pg_losses2, pg_loss, vf_loss, vf_clipfrac = statements(
            _ARGS, vpreds, values, returns, advantages, logprobs, old_logprobs, padding_mask, padding_mask, slice(None)
        )
        with torch.no_grad():
            pg_clipfrac = masked_mean((pg_losses2 > pg_losses).float(), ~padding_mask)
        return loss, {
            "loss/policy": pg_loss,
            "loss/value": vf_loss,
            "policy/clipfrac": pg_clipfrac,
            "val/clipfrac": vf_clipfrac,
        }

    return ppo_loss


class _ModelOutput(torch.autograd.Function):
    """Makes logits look like the output of a model: they are no leaf, so that train() can divide them in place; without
    a copy."""

    @staticmethod
    def forward(ctx, logits, anchor, gradients):
        ctx.mark_dirty(logits)
        ctx.gradients = gradients
        return logits

    @staticmethod
    def backward(ctx, gradient):
        ctx.gradients.append(gradient)
        return None, torch.zeros(()), None


def _loss_head(train):
    """From the logits to their gradient: the statements of train(), including its statistics and its backward pass."""
    statistics = tuple(
        f"{name}_stats" for name in ("approxkl", "pg_clipfrac", "pg_loss", "vf_loss", "vf_clipfrac", "entropy", "ratio")
    )
    indices = ("ppo_epoch_idx", "minibatch_idx", "gradient_accumulation_idx")
    statements = excerpt(
        train,
        "logits = output.logits",
        "with torch.no_grad()",
        inputs=(
            "args",
            "output",
            "context_length",
            "mb_responses",
            "padding_mask",
            "padding_mask_p1",
            "micro_batch_inds",
            "vpred_temp",
            "mb_values",
            "mb_return",
            "mb_logprobs",
            "mb_advantage",
            "accelerator",
            "optimizer",
            *statistics,
            *indices,
        ),
        outputs=("loss",),
    )
    accelerator = types.SimpleNamespace(backward=torch.Tensor.backward)
    optimizer = types.SimpleNamespace(step=lambda: None, zero_grad=lambda: None)

    def gradients(logits, labels, old_logprobs, advantages, vpreds, values, returns, mask):
        labels, old_logprobs, advantages, values, returns, mask = (
            x[:, :-1] for x in (labels, old_logprobs, advantages, values, returns, mask)
        )
        found, anchor, vpreds = [], torch.zeros((), requires_grad=True), vpreds.detach().requires_grad_()
        output = types.SimpleNamespace(logits=_ModelOutput.apply(logits.detach(), anchor, found))
        padding_mask = mask == 0
        statements(
            _ARGS,
            output,
            1,
            labels,
            padding_mask,
            padding_mask,
            numpy.arange(len(labels)),
            vpreds[..., None],
            values,
            returns,
            old_logprobs,
            advantages,
            accelerator,
            optimizer,
            *(logits.new_zeros(1, 1, 1) for _ in statistics),
            *(0 for _ in indices),
        )
        return found[0], vpreds.grad

    return gradients


def _load(device):
    utils = wheels.under_own_name(_WHEEL, "trl", "trainer.utils")
    trainer = wheels.under_own_name(_WHEEL, "trl", "experimental.ppo.ppo_trainer")
    train = trainer.PPOTrainer.train

    def logprobs(logits, labels):
        return utils.selective_log_softmax(as_batch(logits), as_batch(labels)).flatten()

    def logprobs_and_entropy(logits, labels):
        return logprobs(logits, labels), utils.entropy_from_logits(logits)

    offers = {
        "logprobs": Offer(logprobs),
        "logprobs_and_entropy": Offer(logprobs_and_entropy),
        "kl_rewards": Offer(_kl_rewards(train)),
        "gae": Offer(_gae(train, whiten=False)),
        "gae+masked_whiten": Offer(_gae(train, whiten=True)),
        "masked_whiten": Offer(trainer.masked_whiten),
        "ppo_loss": Offer(_ppo_loss(train), partial=True),
        "loss_head": Offer(_loss_head(train), destroys_logits=True),
    }
    return {op: {PEER.name: offer} for op, offer in offers.items()}


OPS = (
    "logprobs",
    "logprobs_and_entropy",
    "kl_rewards",
    "gae",
    "gae+masked_whiten",
    "masked_whiten",
    "ppo_loss",
    "loss_head",
)
PEER = Peer(f"TRL {wheels.version(_WHEEL)}", OPS, wheels.HOW, _load, functools.partial(wheels.version, _WHEEL))
