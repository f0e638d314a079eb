"""The whole loss of a minibatch from its logits [N, V], forward and backward, in new memory and over the logits.

Floor: the logits are read twice and the gradient is written. With the gradient in place in the forward pass some rows of
the logits are read, and read and written again while they are in a CPU's cache, so that each byte comes and goes once.
"""

import functools

import torch

import ppo_ext
from ppo_ext.ops import reference

from . import bench_logprobs, bench_loss_head, bench_ppo_loss, cases
from .passes import BOTH, FORWARD, Op, Operators
from .suite import OURS, OURS_IN_PLACE, Case, in_float64
from .timing import Traffic

_PER_TOKEN = ("old_logprobs", "advantages", "vpreds", "values", "returns", "mask")
_COMPOSED = "logprobs_and_entropy, ppo_loss"


def _loss(inputs, op):
    return op(*(inputs[name] for name in ("logits", "labels", *_PER_TOKEN)))[0]


def _operators(x):
    logprobs, entropy, *_ = torch.ops.ppo_ext._logprobs.default(
        x["logits"], x["labels"], x["mask"], None, 1.0, True, None
    )
    tokens = (logprobs, *(x[name] for name in _PER_TOKEN), None, None, entropy, None, None)
    return torch.ops.ppo_ext._ppo_loss_options.default(*tokens, bench_ppo_loss.NO_OPTIONS)


OPS = {"ppo_loss_from_logits": Op(_loss, ("logits",))}
OPERATORS = {"ppo_loss_from_logits": Operators(_operators, 1)}


def composed(logits, labels, *tokens):
    logprobs, entropy = ppo_ext.logprobs_and_entropy(logits, labels, mask=tokens[-1])
    ppo_ext.masked_mean(entropy.detach(), tokens[-1])
    return ppo_ext.ppo_loss(logprobs, *tokens)


def _inputs(shape, dtype, device):
    return {
        name: x.flatten(0, 1) for name, x in bench_loss_head._inputs((1, *shape), dtype, device).items() if x.dim() > 1
    }


def case(shape, dtype, pass_name, device, *, kind="speed", with_compiled=True):
    op, size, speed = OPS["ppo_loss_from_logits"], shape[0] * shape[1] * dtype.itemsize, kind == "speed"
    implementations = {OURS: op.implementation(pass_name, ppo_ext.ppo_loss_from_logits)}
    if speed:
        in_place = functools.partial(ppo_ext.ppo_loss_from_logits, inplace_forward=True)
        implementations |= {
            OURS_IN_PLACE: op.implementation(pass_name, in_place, destroys_logits=True, traffic=Traffic(update=size)),
            _COMPOSED: op.implementation(pass_name, composed),
        }
    return Case(
        "ppo_loss_from_logits",
        pass_name,
        shape,
        dtype,
        make=lambda device: _inputs(shape, dtype, device),
        reference=lambda inputs: op.results(pass_name, in_float64(inputs), reference.ppo_loss_from_logits),
        implementations=implementations,
        traffic=bench_logprobs.traffic(size, pass_name),
        kind=kind,
        buffer_bytes=size if speed else None,
        capturable=True,
    )


def suite(device, full):
    for shape in cases.logits_shapes(device, full, with_gradient=True):
        for dtype in cases.LOGIT_DTYPES if full else (torch.float32,):
            yield case(shape, dtype, BOTH, device)


def tiny_cases(device):
    yield case(cases.TINY_LOGITS, torch.float32, FORWARD, device, **cases.OVERHEAD)
