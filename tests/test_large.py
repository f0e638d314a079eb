"""Offsets beyond 2^32 elements, more rows than 65535, and tensors of many megabytes: sizes at which kernels of other
libraries have failed.

The tensors with large offsets are views of address space of which only a few pages are ever touched.
"""

import mmap

import pytest
import torch
from cases import logits_inputs, valid_arguments
from conftest import assert_same_bits, assert_within_torch_error
from ops import OPS

import ppo_ext
from ppo_ext.ops import reference

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
BEYOND = 2**30 + 16  # four times this exceeds 32 bits without a sign, twice this exceeds 32 bits with a sign


def sparse(shape, strides):
    """A bfloat16 view with these strides in the middle of zeros, which a wrapped 32-bit offset would read instead."""
    before, after = 2**31, sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    try:
        memory = mmap.mmap(-1, 2 * (before + after), flags=flags)
    except OSError as error:
        pytest.skip(f"the system reserves no {2 * (before + after) >> 30} GiB of address space: {error}")
    return torch.frombuffer(memory, dtype=torch.bfloat16, count=before + after).as_strided(shape, strides, before)


def run(op, logits, other, **options):
    """The results of an op on logits and the gradient, which it writes over the logits."""
    leaf = logits.requires_grad_()
    results = op(leaf.view_as(leaf), other, inplace_backward=True, temperature=0.7, **options)
    results = results if isinstance(results, tuple) else (results,)
    sum((i + 1) * result.sum() for i, result in enumerate(results)).backward()
    return *(result.detach() for result in results), leaf.detach()


@pytest.mark.parametrize("name", ("logprobs_and_entropy", "full_kl"))
@pytest.mark.parametrize(
    "shape, strides",
    (
        ((5, 1037), (BEYOND, 1)),
        ((5, 37), (BEYOND, 1)),
        ((2, 37), (1, BEYOND // 8)),
        ((2, 2, 2, 1100), (2 * BEYOND, 3000, BEYOND, 1)),
    ),
    ids=str,
)
def test_offsets_beyond_32_bits(name, shape, strides):
    inputs = logits_inputs(shape, torch.bfloat16)
    logits, other = sparse(shape, strides), inputs["labels"]
    logits.copy_(inputs["logits"])
    options = {"mask": inputs["mask"]}
    other_dense = other
    if name == "full_kl":
        other_dense = inputs["ref_logits"]
        other = sparse(shape, strides)
        other.copy_(other_dense)
    expected = run(getattr(ppo_ext, name), inputs["logits"], other_dense, **options)
    assert all(result.any() for result in expected)
    for i, (a, b) in enumerate(zip(run(getattr(ppo_ext, name), logits, other, **options), expected)):
        assert_same_bits(f"result {i}", a, b)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_more_rows_than_65535(device, op):
    """Rows of 3 logits, or sequences of 2 tokens."""
    shape = (70001, 1) if op.has_vocabulary else (70001, 2)
    arguments = valid_arguments(op, shape, 3, device)
    grads = {name: torch.randn(shape, device=device) for name in op.per_token}
    in_float64 = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    ours, torchs = op.run(arguments, grads), op.run(arguments, grads, reference)
    exact = op.run(in_float64, grads, reference)
    for name, result in ours.items():
        assert_within_torch_error(
            name, result, torchs[name], exact[name], units=2, scale=2.0
        )  # the size of the terms; a row that was not computed would be off by as much


@pytest.mark.parametrize("name", ("logprobs", "full_kl"))
def test_the_gradient_of_many_rows_is_that_of_fewer(name, device):
    """On a CPU a gradient of this size is new memory, whose pages the kernel touches some rows at a time."""
    logits = torch.randn(1100, 2**13, device=device)
    other = torch.arange(1100, device=device) if name == "logprobs" else torch.randn_like(logits)
    mask = torch.arange(1100, device=device) % 7 > 0

    def gradient(rows):
        leaf = logits[rows].requires_grad_()
        return torch.autograd.grad(getattr(ppo_ext, name)(leaf, other[rows], mask=mask[rows]).sum(), leaf)[0]

    parts = [gradient(slice(first, first + 100)) for first in range(0, 1100, 100)]
    assert_same_bits("grad_logits", gradient(slice(None)), torch.cat(parts))
