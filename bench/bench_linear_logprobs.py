"""Log-probabilities straight from the hidden states [N, H] and the language model's head [V, H].

The arithmetic of the matrix products takes longer than moving the bytes. So the floor is the products alone, timed in the
same rounds and in the sizes of our tiles: one for the forward pass; four for both, as the backward pass computes the
logits again, and then the gradients of hidden and weight from theirs. With a mask the floor is of the rows that count.
Peak memory is in buffers of the logits, which ours never holds.
"""

import functools

import torch

import ppo_ext
from ppo_ext.ops import _linear_head, reference

from . import cases, peers
from .passes import BOTH, FORWARD, Op, Operators
from .suite import OURS, Case, in_float64

_LEAVES = ("hidden", "weight")
_GRADS = ("grad_logprobs", "grad_entropy")


def _call(inputs, op):
    return op(*(inputs[name] for name in ("hidden", "weight", "labels")))


def _call_masked(inputs, op):
    return op(*(inputs[name] for name in ("hidden", "weight", "labels")), mask=inputs["mask"])


OPS = {
    "linear_logprobs": Op(_call, _LEAVES, _GRADS[:1]),
    "linear_logprobs_and_entropy": Op(_call, _LEAVES, _GRADS),
    "linear_statistics": Op(_call, _LEAVES, _GRADS),
}
MASKED = "linear_logprobs+mask"  # three rows in four do not count
_MASKED_OP = Op(_call_masked, _LEAVES, _GRADS[:1])
_NUMBERS = (None, None, None, 1.0, 1.0, 0.0)  # no bias, mask or temperatures; temperature, scale, no softcap


def _forward(inputs, with_entropy, with_statistics):
    tensors = (inputs["hidden"], inputs["weight"], inputs["labels"])
    return torch.ops.ppo_ext._linear_logprobs.default(*tensors, *_NUMBERS, with_entropy, with_statistics, None)


def _backward(inputs, outputs, with_entropy):
    tensors = (inputs["hidden"], inputs["weight"], inputs["labels"])
    grads = (inputs["grad_logprobs"], inputs["grad_entropy"] if with_entropy else None)
    needs = (True, True, False)
    return torch.ops.ppo_ext._linear_logprobs_backward.default(*tensors, *_NUMBERS, *grads, *outputs[1:4], *needs)[:2]


def _operators(with_entropy, with_statistics):
    return Operators(
        functools.partial(_forward, with_entropy=with_entropy, with_statistics=with_statistics),
        2 if with_entropy else 1,
        functools.partial(_backward, with_entropy=with_entropy),
    )


OPERATORS = {
    "linear_logprobs": _operators(False, False),
    "linear_logprobs_and_entropy": _operators(True, False),
    "linear_statistics": _operators(True, True),
}


def of_all_logits(hidden, weight, labels):
    return ppo_ext.logprobs(hidden @ weight.T, labels)


def _inputs(shape, dtype, device):
    rows, hidden, vocabulary = shape
    return {
        "hidden": torch.randn(rows, hidden, device=device).to(dtype),
        "weight": (torch.randn(vocabulary, hidden, device=device) * 3.0 / hidden**0.5).to(dtype),
        "labels": torch.randint(vocabulary, (rows,), device=device),
        "mask": torch.arange(rows, device=device) % 4 == 0,
        "grad_logprobs": torch.randn(rows, device=device),
        "grad_entropy": torch.randn(rows, device=device),
    }


def _operands(inputs):
    """hidden and weight in the dtype in which they are multiplied: half precision in float32 on a CPU."""
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
    return (hidden, weight) if hidden.is_cuda else (hidden.to(torch.float32), weight.to(torch.float32))


def products(inputs, pass_name):
    """The products that a pass cannot do without, in the sizes of our tiles and in memory that is there already."""
    hidden, weight = _operands(inputs)
    (rows, _), (vocabulary, _) = hidden.shape, weight.shape
    tile_rows, columns = _linear_head.tile_sizes(rows, vocabulary, hidden.device.type)
    tile = hidden.new_empty(tile_rows, columns)
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.empty_like(weight)
    tiles = [
        (slice(n, min(n + tile_rows, rows)), slice(v, min(v + columns, vocabulary)))
        for v in range(0, vocabulary, columns)
        for n in range(0, rows, tile_rows)
    ]

    def logits(block, part):
        out = tile[: block.stop - block.start, : part.stop - part.start]
        return torch.mm(hidden[block], weight[part].t(), out=out)

    def run():
        for block, part in tiles:
            logits(block, part)
        for block, part in tiles if pass_name == BOTH else ():
            grads = logits(block, part)
            grad_hidden[block].addmm_(grads, weight[part])
            grad_weight[part].addmm_(grads.t(), hidden[block], beta=float(block.start > 0))

    return run


def _counted(inputs):
    """The inputs of the rows that count."""
    return {name: x if name == "weight" else x[inputs["mask"]] for name, x in inputs.items()}


def case(name, shape, dtype, pass_name, device, *, kind="speed", with_compiled=True):
    masked = name == MASKED
    op, public = (_MASKED_OP, "linear_logprobs") if masked else (OPS[name], name)
    ours, exact = getattr(ppo_ext, public), getattr(reference, public)
    implementations = {OURS: op.implementation(pass_name, ours)}
    if name == "linear_logprobs":
        implementations["logprobs of all logits"] = op.implementation(pass_name, of_all_logits)
    speed = kind == "speed"
    return Case(
        name,
        pass_name,
        shape,
        dtype,
        make=lambda device: _inputs(shape, dtype, device),
        reference=lambda inputs: op.results(pass_name, in_float64(inputs), exact),
        implementations=implementations | peers.implementations(name, op, pass_name, device, dtype, with_compiled),
        traffic=None,
        products=(lambda inputs: products(_counted(inputs) if masked else inputs, pass_name)) if speed else None,
        kind=kind,
        buffer_bytes=shape[0] * shape[2] * dtype.itemsize if speed else None,
        capturable=True,
    )


def suite(device, full):
    half = torch.bfloat16
    low = half if device.type == "cuda" else torch.float32  # the dtype in which a head of that size is trained
    shapes = cases.linear_shapes(device, full)
    for shape in shapes:
        for pass_name in (FORWARD, BOTH) if full else (BOTH,):
            for dtype in (low, half) if full and low != half and pass_name == BOTH else (low,):
                yield case("linear_logprobs", shape, dtype, pass_name, device)
    yield case(MASKED, shapes[0], low, BOTH, device)
    if full:
        yield case(MASKED, cases.MASKED_LINEAR[device.type], low, BOTH, device)
        yield case("linear_logprobs_and_entropy", shapes[0], low, BOTH, device)
        yield case("linear_statistics", shapes[0], low, FORWARD, device)


def tiny_cases(device):
    for name in OPS:
        for pass_name in (FORWARD, BOTH):
            yield case(name, cases.TINY_LINEAR, torch.float32, pass_name, device, **cases.OVERHEAD)
