"""full_kl: forward, backward, and both. Floor: both logits are read once in each pass, and the gradient is written.

The forward pass reads 2*N*V*s bytes (s = size of a logit). The backward pass reads them again and writes N*V*s.
"""

import functools

import torch

import ppo_ext
from ppo_ext.ops import reference

from . import cases, peers
from .bench_logprobs import by_rows, passes, traffic
from .passes import BOTH, FORWARD, Op, Operators
from .suite import OURS, OURS_IN_PLACE, Case

OPS = {
    "full_kl": Op(lambda inputs, op: op(inputs["logits"], inputs["ref_logits"]), ("logits",), ("grad_logprobs",)),
}
OPERATORS = {
    "full_kl": Operators(
        lambda x: torch.ops.ppo_ext._full_kl.default(x["logits"], x["ref_logits"], None, None, 1.0),
        1,
        lambda x, out: torch.ops.ppo_ext._full_kl_backward.default(
            x["logits"], x["ref_logits"], x["grad_logprobs"], None, *out[1:], None, 1.0
        ),
    )
}


def case(shape, dtype, pass_name, device, *, kind="speed", with_compiled=True):
    op, size = OPS["full_kl"], shape[0] * shape[1] * dtype.itemsize
    implementations = {OURS: op.implementation(pass_name, ppo_ext.full_kl)}
    if pass_name == BOTH and kind == "speed":
        implementations[OURS_IN_PLACE] = op.implementation(
            pass_name,
            functools.partial(ppo_ext.full_kl, inplace_backward=True),
            destroys_logits=True,
            traffic=traffic(size, pass_name, reads=2, in_place=True),
        )
    return Case(
        "full_kl",
        pass_name,
        shape,
        dtype,
        make=lambda device: cases.logits_inputs(shape, dtype, device),
        reference=lambda inputs: by_rows(lambda rows: op.results(pass_name, rows, reference.full_kl), inputs),
        implementations=implementations | peers.implementations("full_kl", op, pass_name, device, dtype, with_compiled),
        traffic=traffic(size, pass_name, reads=2),
        kind=kind,
        capturable=True,
        buffer_bytes=size if pass_name == BOTH and kind == "speed" else None,
    )


def suite(device, full):
    for pass_name, shape, dtype in passes(device, full):
        if full or dtype == torch.float32:
            yield case(shape, dtype, pass_name, device)


def tiny_cases(device):
    for pass_name in (FORWARD, BOTH):
        yield case(cases.TINY_LOGITS, torch.float32, pass_name, device, **cases.OVERHEAD)
