"""masked_whiten: mean and variance over the counted tokens, then the scaled values. Floor: one array in, one out.

Reads the values, 4 bytes for each token, and the int64 mask, and writes 4 bytes; a backward pass does the same again.
Results and gradients are compared where the mask counts.
"""

import dataclasses

import torch

import ppo_ext
from ppo_ext.ops import reference

from . import cases, peers
from .bench_gae import masked_in
from .passes import BACKWARD, BOTH, FORWARD, Op, Operators
from .suite import OURS, Case, in_float64
from .timing import Traffic

_MOMENT = Op(lambda inputs, op: op(inputs["advantages"], inputs["mask"]), ("advantages",))
OPS = {
    "masked_mean": _MOMENT,
    "masked_var": _MOMENT,
    "masked_whiten": dataclasses.replace(_MOMENT, incoming=("incoming",)),
}
OPERATORS = {
    "masked_whiten": Operators(
        lambda x: torch.ops.ppo_ext._masked_whiten.default(x["advantages"], x["weights"], 0, True, 1e-8),
        1,
        lambda x, out: torch.ops.ppo_ext._masked_whiten_backward.default(
            x["incoming"], x["advantages"], x["weights"], out[1], 0, True, 1e-8
        ),
    )
}
SHAPES = ([(64, 512)], [(64, 512), (8, 128), (512, 1024)])  # [B, T] of the selection and of the full list


def _inputs(shape, device):
    inputs = cases.token_inputs(shape, device)
    return {**inputs, "incoming": torch.where(inputs["mask"] != 0, torch.randn(shape, device=device), 0.0)}


def case(shape, pass_name, device, *, kind="speed", with_compiled=True):
    op, tokens = OPS["masked_whiten"], shape[0] * shape[1] * (2 if pass_name == BOTH else 1)
    return Case(
        "masked_whiten",
        pass_name,
        shape,
        torch.float32,
        make=lambda device: _inputs(shape, device),
        reference=lambda inputs: op.results(pass_name, in_float64(inputs), reference.masked_whiten),
        implementations={
            OURS: op.implementation(pass_name, ppo_ext.masked_whiten),
            **peers.implementations("masked_whiten", op, pass_name, device, with_compiled=with_compiled),
        },
        select=masked_in,
        traffic=Traffic(read=8 * tokens, copy=4 * tokens),
        kind=kind,
        capturable=True,
    )


def suite(device, full):
    for i, shape in enumerate(SHAPES[full]):
        for pass_name in (FORWARD, *[BACKWARD] * (i == 0), BOTH) if full else (FORWARD,):
            yield case(shape, pass_name, device)


def tiny_cases(device):
    for pass_name in (FORWARD, BOTH):
        yield case(cases.TINY_TOKENS, pass_name, device, **cases.OVERHEAD)
