"""Offsets beyond 2^32 elements and more rows than 65535, the limits that kernels of other projects had; large memory.

The tensors with such offsets are views of memory that is reserved but, but for a few pages, never used.
"""

import mmap

import pytest
import torch
from cases import logits_inputs, token_inputs
from conftest import assert_same_bits, assert_within_torch_error

import ppo_ext
from ppo_ext.ops import reference

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
BEYOND = 2**30 + 16  # four times this does not fit into 32 bits, twice this does not with a sign


def sparse(shape, strides):
    """A bfloat16 view with these strides. What a 32-bit offset would reach instead, before and after it, is zeros."""
    before, after = 2**31, sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    try:
        memory = mmap.mmap(-1, 2 * (before + after), flags=flags)
    except OSError as error:
        pytest.skip(f"the system reserves no {2 * (before + after) >> 30} GiB of address space: {error}")
    return torch.frombuffer(memory, dtype=torch.bfloat16, count=before + after).as_strided(shape, strides, before)


def run(op, logits, other, **options):
    """The results of an op on logits and their gradient, written over the logits."""
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


@pytest.mark.parametrize("name", ("logprobs_and_entropy", "full_kl"))
def test_more_rows_than_65535(device, name):
    inputs = logits_inputs((70001, 3), torch.float32, device)
    other = inputs["ref_logits"] if name == "full_kl" else inputs["labels"]

    def results(op, dtype):
        logits = inputs["logits"].to(dtype).requires_grad_()
        out = op(logits, other.to(dtype) if name == "full_kl" else other, mask=inputs["mask"])
        out = out if isinstance(out, tuple) else (out,)
        (grad,) = torch.autograd.grad(sum((x * inputs["grad_logprobs"]).sum() for x in out), logits)
        return *(x.detach() for x in out), grad

    ours, torchs, exact = (
        results(op, dtype)
        for op, dtype in (
            (getattr(ppo_ext, name), torch.float32),
            (getattr(reference, name), torch.float32),
            (getattr(reference, name), torch.float64),
        )
    )
    for i, (a, b, c) in enumerate(zip(ours, torchs, exact)):
        assert_within_torch_error(f"result {i}", a, b, c)


def test_more_sequences_than_65535(device):
    inputs = token_inputs((70001, 2), device)

    def results(module, dtype):
        x = {k: v if k == "mask" else v.to(dtype) for k, v in inputs.items()}
        return [
            *module.gae(x["values"], x["rewards"], x["mask"], gamma=0.9, lam=0.8),
            *module.kl_rewards(x["scores"], x["logprobs"], x["ref_logprobs"], x["mask"], kl_coef=0.2),
            module.masked_whiten(x["values"], x["mask"]),
        ]

    ours, torchs, exact = (
        results(module, dtype)
        for module, dtype in ((ppo_ext, torch.float32), (reference, torch.float32), (reference, torch.float64))
    )
    for i, (a, b, c) in enumerate(zip(ours, torchs, exact)):
        assert_within_torch_error(f"result {i}", a, b, c)


@pytest.mark.parametrize("name", ("logprobs", "full_kl"))
def test_the_gradient_of_many_rows_is_that_of_fewer(name, device):
    """On a CPU a gradient of this size is new memory, whose pages are made present some rows at a time."""
    logits = torch.randn(1100, 2**13, device=device)
    other = torch.arange(1100, device=device) if name == "logprobs" else torch.randn_like(logits)
    mask = torch.arange(1100, device=device) % 7 > 0

    def gradient(rows):
        leaf = logits[rows].requires_grad_()
        return torch.autograd.grad(getattr(ppo_ext, name)(leaf, other[rows], mask=mask[rows]).sum(), leaf)[0]

    parts = [gradient(slice(first, first + 100)) for first in range(0, 1100, 100)]
    assert_same_bits("grad_logits", gradient(slice(None)), torch.cat(parts))
