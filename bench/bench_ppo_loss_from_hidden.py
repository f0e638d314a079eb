"""The whole loss of a minibatch straight from the hidden states [N, H] and the head [V, H], forward and backward.

The floor is the matrix products alone, timed in the same rounds and in the sizes of our chunks: one for the forward
pass; three for both, as the gradients of a chunk's logits are made while the logits are there. Peak memory is in buffers
of all logits. Beside ours stand the ops that it joins: linear_logprobs_and_entropy, which computes the logits twice, and
ppo_loss_from_logits, which holds them all.
"""

import torch

import ppo_ext
from ppo_ext.ops import _linear_head, reference

from . import bench_linear_logprobs, bench_ppo_loss, cases
from .passes import BOTH, FORWARD, Op, Operators
from .suite import OURS, Case, in_float64

_PER_TOKEN = ("old_logprobs", "advantages", "vpreds", "values", "returns", "mask")
_LEAVES = ("hidden", "weight")
_NUMBERS = (1.0, 1.0, 0.0)  # temperature, scale, no softcap
MASKED = "ppo_loss_from_hidden+mask"  # three rows in four do not count


def _loss(inputs, op):
    return op(*(inputs[name] for name in ("hidden", "weight", "labels", *_PER_TOKEN)))[0]


def _operator(inputs):
    head = (inputs["hidden"], inputs["weight"], inputs["labels"], None, None)
    tokens = (*(inputs[name] for name in _PER_TOKEN), None, None, None, None, bench_ppo_loss.NO_OPTIONS)
    return torch.ops.ppo_ext._ppo_loss_from_hidden.default(*head, *tokens, *_NUMBERS, True, True, False, None)


OPS = {"ppo_loss_from_hidden": Op(_loss, _LEAVES)}
OPERATORS = {"ppo_loss_from_hidden": Operators(_operator, 1)}


def joined(hidden, weight, labels, *tokens):
    """What the op is made of: the logits are computed twice."""
    logprobs, entropy = ppo_ext.linear_logprobs_and_entropy(hidden, weight, labels, mask=tokens[-1])
    ppo_ext.masked_mean(entropy.detach(), tokens[-1])
    return ppo_ext.ppo_loss(logprobs, *tokens)


def of_all_logits(hidden, weight, labels, *tokens):
    """In float32 as ours: logits in bfloat16 would not be exact enough to be compared."""
    logits = hidden.float() @ weight.float().T
    return ppo_ext.ppo_loss_from_logits(logits, labels, *tokens, inplace_forward=True)


def _inputs(shape, dtype, device, masked):
    """The old log-probabilities are near the present ones, as in the epochs of a PPO step."""
    inputs = bench_linear_logprobs._inputs(shape, dtype, device)
    tokens = cases.token_inputs((1, shape[0]), device)
    inputs |= {name: tokens[name][0] for name in _PER_TOKEN if name != "mask"}
    if not masked:
        inputs["mask"] = torch.ones_like(inputs["mask"])
    logprobs = ppo_ext.linear_logprobs(*(inputs[name] for name in ("hidden", "weight", "labels")))
    inputs["old_logprobs"] = logprobs + 0.2 * torch.randn_like(logprobs)
    return inputs


def products(inputs, pass_name):
    """The products that a pass cannot do without, in the sizes of our chunks and in memory that is there already."""
    hidden, weight = bench_linear_logprobs._operands(inputs)
    (rows, _), (vocabulary, _) = hidden.shape, weight.shape
    chunk_rows, columns = _linear_head.chunk_sizes(rows, vocabulary, hidden.device.type)
    chunk = hidden.new_empty(chunk_rows, -(-vocabulary // 4) * 4)
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.empty_like(weight)
    parts = [slice(v, min(v + columns, vocabulary)) for v in range(0, vocabulary, columns)]

    def run():
        for start in range(0, rows, chunk_rows):
            block = slice(start, min(start + chunk_rows, rows))
            logits = chunk[: block.stop - start]
            for part in parts:
                torch.mm(hidden[block], weight[part].t(), out=logits[:, part])
            for part in parts if pass_name == BOTH else ():
                grad_hidden[block].addmm_(logits[:, part], weight[part])
                grad_weight[part].addmm_(logits[:, part].t(), hidden[block], beta=float(start > 0))

    return run


def case(name, shape, dtype, pass_name, device, *, kind="speed", with_compiled=True):
    op, speed = OPS["ppo_loss_from_hidden"], kind == "speed"
    others = {"linear_logprobs_and_entropy, ppo_loss": joined, "ppo_loss_from_logits of all logits": of_all_logits}
    implementations = {OURS: ppo_ext.ppo_loss_from_hidden, **(others if speed else {})}
    counted = bench_linear_logprobs._counted if name == MASKED else lambda inputs: inputs
    return Case(
        name,
        pass_name,
        shape,
        dtype,
        make=lambda device: _inputs(shape, dtype, device, name == MASKED),
        reference=lambda inputs: op.results(pass_name, in_float64(inputs), reference.ppo_loss_from_hidden),
        implementations={who: op.implementation(pass_name, function) for who, function in implementations.items()},
        traffic=None,
        products=(lambda inputs: products(counted(inputs), pass_name)) if speed else None,
        kind=kind,
        buffer_bytes=shape[0] * shape[2] * dtype.itemsize if speed else None,
        capturable=True,
    )


def suite(device, full):
    half = torch.bfloat16
    low = half if device.type == "cuda" else torch.float32  # the dtype in which a head of that size is trained
    shapes = cases.linear_shapes(device, full)
    for shape in shapes:
        for dtype in (low, half) if full and low != half else (low,):
            yield case("ppo_loss_from_hidden", shape, dtype, BOTH, device)
    yield case(MASKED, cases.MASKED_LINEAR[device.type] if full else shapes[0], low, BOTH, device)


def tiny_cases(device):
    yield case("ppo_loss_from_hidden", cases.TINY_LINEAR, torch.float32, FORWARD, device, **cases.OVERHEAD)
