"""ppo_loss with all its statistics: forward, backward, and both. Floor: 6 arrays and the mask in, 4 arrays out.

A forward pass reads 24 bytes for each token and the int64 mask. It writes 16 bytes: the gradients of logprobs and
vpreds but for a factor, and the two per-token statistics. A backward pass reads the two gradients and writes them
multiplied by the factor. TRL's loss also computes the entropy of the logits, which is left out here and timed with
logprobs_and_entropy. Checked are both gradients, the loss, and those statistics that an implementation returns.

"+dual_clip" is the policy loss that the frameworks have in common, without a critic; its loss and gradient are checked.
"+unread", "+two_bounds" and "+all_options" show what a call without and with options costs on the host while nobody reads
its statistics, which then become no tensors.
"""

import functools

import torch

import ppo_ext
from ppo_ext.ops import reference

from . import cases, peers
from .passes import BACKWARD, BOTH, FORWARD, Op, Operators
from .suite import OURS, Case, in_float64
from .timing import Traffic

_PER_TOKEN = ("logprobs", "old_logprobs", "advantages", "vpreds", "values", "returns", "mask")
# every version of TRL has the first four
_STATS = (
    "loss/policy",
    "loss/value",
    "policy/clipfrac",
    "val/clipfrac",
    "policy/approxkl",
    "policy/policykl",
    "policy/advantages_mean",
    "returns/mean",
    "returns/var",
    "val/vpred",
    "val/error",
    "val/mean",
    "val/var",
)


def _loss_alone(inputs, op, tensors=()):
    return op(**{name: inputs[name] for name in (*_PER_TOKEN, *tensors)})[0]


def _loss_and_stats(inputs, op):
    loss, stats = op(**{name: inputs[name] for name in _PER_TOKEN})
    return loss, *(stats[name] for name in _STATS if name in stats)


def _policy_loss(inputs, op):
    return op(*(inputs[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")))


def clipped_twice(logprobs, old_logprobs, advantages, mask, op=ppo_ext.ppo_loss):
    """The policy loss that the frameworks have in common: two clip bounds and the dual clip, no critic."""
    no_critic = (None, None, None)
    return op(logprobs, old_logprobs, advantages, *no_critic, mask, cliprange=(0.2, 0.28), dual_clip=3.0)[0]


OPS = {"ppo_loss": Op(_loss_and_stats, ("logprobs", "vpreds"))}
CLIPPED_TWICE, _POLICY = "ppo_loss+dual_clip", Op(_policy_loss, ("logprobs",))
_TENSORS = ("weights", "ref_logprobs", "entropy")
UNREAD, TWO_BOUNDS, ALL_OPTIONS = "ppo_loss+unread", "ppo_loss+two_bounds", "ppo_loss+all_options"
OPTIONS = {
    UNREAD: {},
    TWO_BOUNDS: {"cliprange": (0.2, 0.28)},
    ALL_OPTIONS: {
        "cliprange": (0.2, 0.28),
        "dual_clip": 3.0,
        "log_ratio_clamp": 20.0,
        "kl_coef": 0.1,
        "kl_estimator": "k3",
        "entropy_coef": 0.01,
        "value_loss": "huber",
        "scale": 0.5,
    },
}
# Of the operator with options, where all are off: NUMBERS and CHOICES of ppo_ext/ops/_ppo_options.py.
NO_OPTIONS = [0.2, 0.2, 0.2, 0.1, float("inf"), 0.0, 0.0, 0.0, 0.0, 10.0, 0.0, 0.0, 1.0, *[0.0] * 6]


def _with_options(numbers, *given):
    """The operators with options, where `given` are the tensors that there are."""

    def forward(x):
        others = (x[name] if name in given else None for name in _TENSORS)
        return torch.ops.ppo_ext._ppo_loss_options.default(
            *(x[name] for name in _PER_TOKEN), *others, None, None, numbers
        )

    def backward(x, out):
        needs = True, True, "entropy" in given
        return torch.ops.ppo_ext._ppo_loss_options_backward.default(x["one"], out[1], out[3], *needs)[:2]

    return Operators(forward, 1, backward)


_PLAIN = Operators(
    lambda x: torch.ops.ppo_ext._ppo_loss.default(*(x[name] for name in _PER_TOKEN), 0.2, 0.2, 0.1, float("inf")),
    1,
    lambda x, out: torch.ops.ppo_ext._ppo_loss_backward.default(x["one"], out[1], *out[4:]),
)
OPERATORS = {
    "ppo_loss": _PLAIN,
    UNREAD: _PLAIN,
    TWO_BOUNDS: _with_options([0.2, 0.28, *NO_OPTIONS[2:]]),
    ALL_OPTIONS: _with_options(
        [0.2, 0.28, 0.2, 0.1, float("inf"), 3.0, 20.0, 0.1, 0.01, 10.0, 0.0, 0.0, 0.5, 0.0, 0.0, 2.0, 0.0, 1.0, 0.0],
        *_TENSORS,
    ),
}
SHAPES = ([(8, 512)], [(8, 512), (64, 512), (2, 64)])  # [B, T] of the selection and of the full list


def case(shape, pass_name, device, *, kind="speed", with_compiled=True):
    op, tokens = OPS["ppo_loss"], shape[0] * shape[1]
    forward, backward = Traffic(read=16 * tokens, copy=16 * tokens), Traffic(copy=8 * tokens)
    both = Traffic(read=16 * tokens, copy=24 * tokens)
    return Case(
        "ppo_loss",
        pass_name,
        shape,
        torch.float32,
        make=lambda device: cases.token_inputs(shape, device),
        reference=lambda inputs: op.results(pass_name, in_float64(inputs), reference.ppo_loss),
        implementations={
            OURS: op.implementation(pass_name, ppo_ext.ppo_loss),
            **peers.implementations("ppo_loss", op, pass_name, device, with_compiled=with_compiled),
        },
        traffic={FORWARD: forward, BACKWARD: backward, BOTH: both}[pass_name],
        kind=kind,
        capturable=True,
    )


def policy_case(shape, pass_name, device):
    """Without the values and their gradient: 3 arrays and the mask in, 3 arrays out, then a gradient in and out."""
    tokens, exact = shape[0] * shape[1], functools.partial(clipped_twice, op=reference.ppo_loss)
    return Case(
        CLIPPED_TWICE,
        pass_name,
        shape,
        torch.float32,
        make=lambda device: cases.token_inputs(shape, device),
        reference=lambda inputs: _POLICY.results(pass_name, in_float64(inputs), exact),
        implementations={
            OURS: _POLICY.implementation(pass_name, clipped_twice),
            **peers.implementations(CLIPPED_TWICE, _POLICY, pass_name, device),
        },
        traffic=Traffic(read=8 * tokens, copy=(12 if pass_name == FORWARD else 16) * tokens),
    )


def _option_inputs(shape, device):
    inputs = cases.token_inputs(shape, device)
    return inputs | {"weights": inputs["mask"].float(), "entropy": inputs["logprobs"].neg()}


def options_case(name, pass_name, device):
    tensors = _TENSORS if name == ALL_OPTIONS else ()
    op = Op(functools.partial(_loss_alone, tensors=tensors), OPS["ppo_loss"].leaves, options=OPTIONS[name])
    return Case(
        name,
        pass_name,
        cases.TINY_TOKENS,
        torch.float32,
        make=lambda device: _option_inputs(cases.TINY_TOKENS, device),
        reference=lambda inputs: op.results(pass_name, in_float64(inputs), op.of(reference, "ppo_loss")),
        implementations={OURS: op.implementation(pass_name, op.of(ppo_ext, "ppo_loss"))},
        traffic=None,
        kind=cases.OVERHEAD["kind"],
    )


def suite(device, full):
    for i, shape in enumerate(SHAPES[full]):
        for pass_name in (FORWARD, *[BACKWARD] * (i == 0), BOTH) if full else (BOTH,):
            yield case(shape, pass_name, device)
        yield policy_case(shape, BOTH, device)


def tiny_cases(device):
    for pass_name in (FORWARD, BOTH):
        yield case(cases.TINY_TOKENS, pass_name, device, **cases.OVERHEAD)
        for name in OPTIONS:
            yield options_case(name, pass_name, device)
