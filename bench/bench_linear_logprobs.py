"""Log-probabilities straight from the hidden states [N, H] and the language model's head [V, H].

There is no kernel of ours for this yet: ours is torch's matrix product followed by `logprobs`, which holds the logits
in memory; some peers never do. Measured are the time and the peak memory, in buffers of the logits' size. The
arithmetic of the matrix product takes longer than moving the bytes, so there is no memory floor.
"""

import torch

import ppo_ext
from ppo_ext.ops import reference

from . import cases, peers
from .passes import BOTH, FORWARD, Op
from .suite import OURS, OURS_IN_PLACE, Case, in_float64

OP = Op(
    lambda inputs, op: op(inputs["hidden"], inputs["weight"], inputs["labels"]), ("hidden", "weight"), ("incoming",)
)


def ours(hidden, weight, labels):
    return ppo_ext.logprobs(hidden @ weight.T, labels)


def ours_in_place(hidden, weight, labels):
    return ppo_ext.logprobs(hidden @ weight.T, labels, inplace_backward=True)


def exact(hidden, weight, labels):
    return reference.logprobs(hidden @ weight.T, labels)


def _inputs(shape, dtype, device):
    rows, hidden, vocabulary = shape
    return {
        "hidden": torch.randn(rows, hidden, device=device).to(dtype),
        "weight": (torch.randn(vocabulary, hidden, device=device) * 3.0 / hidden**0.5).to(dtype),
        "labels": torch.randint(vocabulary, (rows,), device=device),
        "incoming": torch.randn(rows, device=device),
    }


def case(shape, dtype, pass_name, device):
    implementations = {OURS: OP.implementation(pass_name, ours)}
    if pass_name == BOTH:
        implementations[OURS_IN_PLACE] = OP.implementation(pass_name, ours_in_place)
    return Case(
        "linear_logprobs",
        pass_name,
        shape,
        dtype,
        make=lambda device: _inputs(shape, dtype, device),
        reference=lambda inputs: OP.results(pass_name, in_float64(inputs), exact),
        implementations=implementations | peers.implementations("linear_logprobs", OP, pass_name, device, dtype),
        traffic=None,
        buffer_bytes=shape[0] * shape[2] * dtype.itemsize,
        capturable=True,
    )


def suite(device, full):
    low = (
        torch.bfloat16 if device.type == "cuda" else torch.float32
    )  # the dtype in which a head of that size is trained
    for dtype in cases.LOGIT_DTYPES if full else (low,):
        for pass_name in (FORWARD, BOTH) if full else (BOTH,):
            yield case(cases.linear_shape(device), dtype, pass_name, device)
