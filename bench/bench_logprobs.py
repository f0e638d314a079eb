"""logprobs and logprobs_and_entropy: forward, backward, and both. Floor: the logits are read once in each pass.

A forward pass reads N*V*s bytes (s = size of a logit). A backward pass reads them again and writes the gradient, N*V*s
bytes, to new memory or over the logits.
"""

import dataclasses
import functools

import torch

import ppo_ext
from ppo_ext.ops import reference

from . import cases, peers
from .passes import BACKWARD, BOTH, FORWARD, Op, Operators
from .suite import OURS, OURS_IN_PLACE, Case, in_float64
from .timing import Traffic

_ROWS_AT_ONCE = 32  # for all rows at once the float64 reference would need many times the memory of the logits
OPS = {
    "logprobs": Op(lambda inputs, op: op(inputs["logits"], inputs["labels"]), ("logits",), ("grad_logprobs",)),
    "logprobs_and_entropy": Op(
        lambda inputs, op: op(inputs["logits"], inputs["labels"]), ("logits",), ("grad_logprobs", "grad_entropy")
    ),
}


def _gradient(inputs, out, grad_entropy):
    return torch.ops.ppo_ext._logprobs_backward.default(
        inputs["logits"], inputs["grad_logprobs"], grad_entropy, inputs["labels"], None, *out[1:], None, 1.0
    )


OPERATORS = {
    "logprobs": Operators(
        lambda x: torch.ops.ppo_ext._logprobs.default(x["logits"], x["labels"], None, None, 1.0, False, None),
        1,
        lambda x, out: _gradient(x, out, None),
    ),
    "logprobs_and_entropy": Operators(
        lambda x: torch.ops.ppo_ext._logprobs.default(x["logits"], x["labels"], None, None, 1.0, True, None),
        2,
        lambda x, out: _gradient(x, out, x["grad_entropy"]),
    ),
}


def by_rows(run, inputs):
    """The results of `run` on float64 copies of the inputs, computed some rows at a time."""
    pieces = []
    for start in range(0, inputs["labels"].shape[0], _ROWS_AT_ONCE):
        results = run(in_float64({name: x[start : start + _ROWS_AT_ONCE] for name, x in inputs.items()}))
        pieces.append([x.detach() for x in results])
    return tuple(torch.cat(parts) for parts in zip(*pieces))


def traffic(size, pass_name, *, reads=1, in_place=False):
    """The floor of an op that reads `reads` tensors of `size` bytes in each pass and writes the gradient of one of
    them."""
    if pass_name == FORWARD:
        return Traffic(read=reads * size)
    gradient = {"update" if in_place else "copy": size}  # these read the logits too
    return Traffic(read=(reads - 1 if pass_name == BACKWARD else 2 * reads - 1) * size, **gradient)


def case(name, shape, dtype, pass_name, device, *, kind="speed", with_compiled=True):
    op, ours, exact = OPS[name], getattr(ppo_ext, name), getattr(reference, name)
    size = shape[0] * shape[1] * dtype.itemsize
    implementations = {OURS: op.implementation(pass_name, ours)}
    if pass_name == BOTH and kind == "speed":
        implementations[OURS_IN_PLACE] = op.implementation(
            pass_name,
            functools.partial(ours, inplace_backward=True),
            destroys_logits=True,
            traffic=traffic(size, pass_name, in_place=True),
        )
    return Case(
        name,
        pass_name,
        shape,
        dtype,
        make=lambda device: cases.logits_inputs(shape, dtype, device),
        reference=lambda inputs: by_rows(lambda rows: op.results(pass_name, rows, exact), inputs),
        implementations=implementations | peers.implementations(name, op, pass_name, device, dtype, with_compiled),
        traffic=traffic(size, pass_name),
        kind=kind,
        capturable=True,
        buffer_bytes=size if pass_name == BOTH and kind == "speed" else None,
    )


def passes(device, full, *, backward=False):
    """(pass, shape, dtype) of the cases of an op on logits. In half precision a pass with a gradient costs about the
    same, so it is timed at two shapes only. The backward pass alone is timed once, if `backward`."""
    for dtype in cases.LOGIT_DTYPES:
        for shape in cases.logits_shapes(device, full, with_gradient=False):
            yield FORWARD, shape, dtype
        for i, shape in enumerate(cases.logits_shapes(device, full, with_gradient=True)):
            if dtype == torch.float32 or i < 2:
                yield BOTH, shape, dtype
            if backward and full and dtype == torch.float32 and i == 0:
                yield BACKWARD, shape, dtype


def suite(device, full):
    [selected] = cases.logits_shapes(device, False, with_gradient=True)
    for name in OPS:
        for pass_name, shape, dtype in passes(device, full, backward=name == "logprobs"):
            slow, shown = pass_name == BOTH and dtype != torch.float32, name == "logprobs" and shape == selected
            if full or not slow or (shown and device.type == "cuda"):
                yield dataclasses.replace(case(name, shape, dtype, pass_name, device), featured=slow and shown)


def tiny_cases(device):
    for name in OPS:
        for pass_name in (FORWARD, BOTH):
            yield case(name, cases.TINY_LOGITS, torch.float32, pass_name, device, **cases.OVERHEAD)
