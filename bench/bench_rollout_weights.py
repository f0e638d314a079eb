"""rollout_weights: truncated weights of tokens and their statistics. Floor: 2 arrays and the mask in, 1 array out.

Reads two log-probabilities, 8 bytes for each token, and the int64 mask; writes the weight, 4 bytes.
"""

import torch

import ppo_ext
from ppo_ext.ops import reference

from . import cases
from .bench_gae import masked_in
from .passes import FORWARD, Op, Operators
from .suite import OURS, Case, Implementation, compiled, in_float64
from .timing import Traffic

_INPUTS = ("old_logprobs", "ref_logprobs", "mask")  # another model's log-probabilities stand for the engine's


def _weights(inputs, op):
    return op(*(inputs[name] for name in _INPUTS))[0]


def _in_torch(old_logprobs, rollout_logprobs, mask):
    """The formula of tokens as trainers write it, with the statistics."""
    counts = mask.to(old_logprobs.dtype)
    ratio = torch.exp(old_logprobs - rollout_logprobs) * counts
    weights, count = ratio.clamp(max=2.0), counts.sum()
    ess = weights.sum().square() / weights.square().sum() / count
    return weights, (weights.sum() / count, ess, (ratio > 2.0).sum() / count, ratio.max())


OPS = {"rollout_weights": Op(_weights)}
OPERATORS = {
    "rollout_weights": Operators(
        lambda x: torch.ops.ppo_ext._rollout_weights.default(*(x[name] for name in _INPUTS), 0, 0, 0.0, 2.0), 1
    )
}
SHAPES = ([(64, 512)], [(64, 512), (8, 128)])  # [B, T] of the selection and of the full list


def case(shape, device, *, kind="speed", with_compiled=True):
    op, tokens = OPS["rollout_weights"], shape[0] * shape[1]
    peers = {"torch": _in_torch, **({"torch.compile": compiled(_in_torch)} if with_compiled else {})}
    return Case(
        "rollout_weights",
        FORWARD,
        shape,
        torch.float32,
        make=lambda device: cases.token_inputs(shape, device),
        reference=lambda inputs: op.forward(in_float64(inputs), reference.rollout_weights),
        implementations={
            OURS: op.implementation(FORWARD, ppo_ext.rollout_weights),
            **{name: Implementation(lambda inputs, f=f: op.forward(inputs, f)) for name, f in peers.items()},
        },
        select=masked_in,
        traffic=Traffic(read=12 * tokens, copy=4 * tokens),
        kind=kind,
        capturable=True,
    )


def suite(device, full):
    for shape in SHAPES[full]:
        yield case(shape, device)


def tiny_cases(device):
    yield case(cases.TINY_TOKENS, device, **cases.OVERHEAD)
