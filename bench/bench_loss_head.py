"""The loss head of a training minibatch: from the model's logits [B, T, V] to the gradients of logits and vpreds.

It consists of logprobs, the entropy as a statistic, the loss with all its statistics, and the backward pass. Measured
are the time and the peak memory beyond the logits, in buffers of their size: a gradient of its own is one buffer, a
gradient written over the logits none. The peers run the loss heads of TRL's trainers, which slice logits[:, :-1].
Floor: the logits are read twice and the gradient is written.
"""

import functools

import torch

import ppo_ext
from ppo_ext.ops import reference

from . import bench_logprobs, cases, peers
from .passes import BOTH, FORWARD, Op
from .suite import OURS, OURS_IN_PLACE, Case, in_float64

_PER_TOKEN = ("old_logprobs", "advantages", "vpreds", "values", "returns", "mask")
# the implementations make their own leaves, so one call contains both passes
OP = Op(lambda inputs, op: op(**{name: inputs[name] for name in ("logits", "labels", *_PER_TOKEN)}))


def ours(logits, labels, vpreds, mask, inplace_backward=False, **per_token):
    """As in `ppo_ext.PPOTrainer`: the logits are not sliced, and the last position, which predicts no token, is
    masked."""
    logits, vpreds = (x.detach().requires_grad_() for x in (logits, vpreds))
    logprobs, entropy = ppo_ext.logprobs_and_entropy(logits, labels, mask=mask, inplace_backward=inplace_backward)
    ppo_ext.masked_mean(entropy.detach(), mask)
    loss, _ = ppo_ext.ppo_loss(logprobs, vpreds=vpreds, mask=mask, **per_token)
    return torch.autograd.grad(loss, (logits, vpreds))


def exact(inputs):
    """Both gradients in float64, first of the loss on [B, T], then of the logits, some rows at a time."""
    rows = {"logits": inputs["logits"].flatten(0, 1), "labels": inputs["labels"].flatten()}
    of_rows = bench_logprobs.OPS["logprobs"]
    [logprobs] = bench_logprobs.by_rows(lambda some: of_rows.forward(some, reference.logprobs), rows)
    per_token = in_float64({name: inputs[name] for name in _PER_TOKEN})
    leaves = {
        "logprobs": logprobs.view_as(per_token["vpreds"]).requires_grad_(),
        "vpreds": per_token.pop("vpreds").requires_grad_(),
    }
    loss, _ = reference.ppo_loss(**per_token, **leaves)
    grad_logprobs, grad_vpreds = torch.autograd.grad(loss, tuple(leaves.values()))
    [grad_logits] = bench_logprobs.by_rows(
        lambda some: of_rows.gradients(of_rows.graph(some, reference.logprobs)),
        {**rows, "grad_logprobs": grad_logprobs.flatten()},
    )
    return grad_logits.view_as(inputs["logits"]), grad_vpreds


def _inputs(shape, dtype, device):
    """The old log-probabilities are near the present ones, as in the epochs of a PPO step; the last position is
    masked."""
    inputs = {**cases.token_inputs(shape[:2], device), **cases.logits_inputs(shape, dtype, device)}
    noise = 0.2 * torch.randn(shape[:2], device=device)
    inputs["old_logprobs"] = ppo_ext.logprobs(inputs["logits"], inputs["labels"]) + noise
    inputs["mask"] = inputs["mask"].long()
    inputs["mask"][:, -1] = 0
    del inputs["ref_logits"]
    return inputs


def case(shape, dtype, device):
    size = shape[0] * shape[1] * shape[2] * dtype.itemsize
    in_place = OP.implementation(
        FORWARD,
        functools.partial(ours, inplace_backward=True),
        destroys_logits=True,
        traffic=bench_logprobs.traffic(size, BOTH, in_place=True),
    )
    return Case(
        "loss_head",
        BOTH,
        shape,
        dtype,
        make=lambda device: _inputs(shape, dtype, device),
        reference=exact,
        implementations={
            OURS: OP.implementation(FORWARD, ours),
            OURS_IN_PLACE: in_place,
            **peers.implementations("loss_head", OP, FORWARD, device, dtype),
        },
        traffic=bench_logprobs.traffic(size, BOTH),
        buffer_bytes=size,
        capturable=True,
    )


def suite(device, full):
    for dtype in cases.LOGIT_DTYPES if full else (torch.float32,):
        yield case(cases.head_shape(device), dtype, device)
