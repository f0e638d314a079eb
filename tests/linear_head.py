"""Inputs of the ops on hidden states, all their results, and what the tests change and record of their tiles."""

import torch

import ppo_ext
from ppo_ext.ops import _linear_gradients, _linear_head

OPTIONS = {
    "plain": {},
    "tempered": {"temperature": 0.7},
    "scaled and capped": {"temperature": 0.7, "logit_scale": 1.5, "softcap": 2.0},
}
LEAVES = ("hidden", "weight", "bias")


def head_inputs(shape, V, H, dtype, device="cpu"):
    """hidden [..., H], weight [V, H], bias [V], labels, mask and the incoming gradients of the two results."""
    return {
        "hidden": torch.randn(*shape, H, device=device).to(dtype),
        "weight": (torch.randn(V, H, device=device) * 3.0 / H**0.5).to(dtype),
        "bias": torch.randn(V, device=device).to(dtype),
        "labels": torch.randint(V, shape, device=device),
        "mask": torch.rand(shape, device=device) > 0.3,
        "grad_logprobs": torch.randn(shape, device=device),
        "grad_entropy": torch.randn(shape, device=device),
    }


def run(inputs, op=ppo_ext.linear_statistics, leaves=LEAVES, dtype=None, **options):
    """All results and, as grad_<name>, the gradients of a random combination of the first two."""
    tensors = {name: inputs[name].to(dtype or inputs[name].dtype).detach() for name in LEAVES if name in inputs}
    leaves = [name for name in leaves if name in tensors]
    for name in leaves:
        tensors[name].requires_grad_()
    results = op(**tensors, labels=inputs["labels"], mask=inputs["mask"], **options)
    loss = (results[0] * inputs["grad_logprobs"]).sum() + (results[1] * inputs["grad_entropy"]).sum()
    grads = torch.autograd.grad(loss, [tensors[name] for name in leaves])
    found = dict(zip(ppo_ext.ops.linear_logprobs.LinearStatistics._fields, [x.detach() for x in results]))
    return found | {f"grad_{name}": grad for name, grad in zip(leaves, grads)}


def make_tiles_small(monkeypatch):
    """Tiles of 4 rows and 16 columns and chunks of 4 rows, so that small inputs have many of them."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(_linear_head._SIZES, device, (4, 64))
        monkeypatch.setitem(_linear_head._CHUNK_ROWS, device, 4)


def record_products(monkeypatch):
    """The list to which the shapes of the factors of every matrix product are added."""
    shapes, multiply = [], _linear_head.multiply

    def recorded(a, b, out, add=False):
        shapes.append((tuple(a.shape), tuple(b.shape)))
        multiply(a, b, out, add)

    for module in (_linear_gradients, _linear_head):
        monkeypatch.setattr(module, "multiply", recorded)
    return shapes
