"""Ops over a group of processes: what one process makes of all tokens, with the same bits on every process."""

import process_group
import pytest
import torch
from conftest import assert_same_bits

import ppo_ext

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPES = {0: (3, 5), 1: (2, 7), 2: (4, 1)}  # of each rank
MOMENTS = [
    ("masked_whiten", {}),
    ("masked_whiten", {"shift_mean": False}),
    ("masked_mean", {}),
    ("masked_mean", {"axis": 0}),
    ("masked_mean", {"axis": (1, 0)}),
]
MASKS = ("all", "some", "one rank none", "one token", "none", "weights")


def numbers(rank, dtype, axis=None):
    """Values, a factor for the loss, of one rank; for axis 0 of as many columns everywhere."""
    generator = torch.Generator().manual_seed(rank)
    shape = (2 + rank, 3) if axis == 0 else SHAPES[rank]
    values = torch.randn(shape, generator=generator) * 3 + 100
    return values.to(dtype), torch.randn(shape, generator=generator)


def mask_of(kind, rank, shape):
    generator = torch.Generator().manual_seed(50 + rank)
    some = torch.rand(shape, generator=generator) > 0.4
    one = torch.zeros(shape, dtype=torch.bool)
    one[0, 0] = rank == 1
    weights = torch.rand(shape, generator=generator) * some
    return {
        "all": torch.ones(shape),
        "some": some,
        "one rank none": some & (rank != 0),
        "one token": one,
        "none": torch.zeros(shape),
        "weights": weights,
    }[kind]


def moments_case(rank, name, options, dtype, kind, group):
    values, factor = numbers(rank, dtype, options.get("axis"))
    mask = mask_of(kind, rank, values.shape)
    values = values.masked_fill(mask == 0, float("nan")).requires_grad_()
    result = getattr(ppo_ext, name)(values, mask, **options, group=group)
    share = result * factor if result.shape == factor.shape else result * (1.0 + rank)
    share.sum().backward()
    return result.detach(), values.grad


def moments_of_all(processes, name, options, dtype, kind):
    """What `moments_case` gives on each rank, by one call of the op on the tokens of all."""
    parts = [numbers(rank, dtype, options.get("axis")) for rank in range(processes)]
    masks = [mask_of(kind, rank, values.shape) for rank, (values, _) in enumerate(parts)]
    values = [
        x.masked_fill(mask == 0, float("nan")).requires_grad_() for (x, _), mask in zip(parts, masks, strict=True)
    ]
    if options.get("axis") == 0:
        result = ppo_ext.masked_mean(torch.cat(values), torch.cat(masks), axis=0)
        results = [result] * processes
    else:
        flat, flat_mask = torch.cat([x.flatten() for x in values]), torch.cat([m.flatten() for m in masks])
        options = {key: value for key, value in options.items() if key != "axis"}
        result = getattr(ppo_ext, name)(flat, flat_mask, **options)
        whitens = result.dim() > 0
        sizes = [x.numel() for x in values]
        results = [r.reshape(x.shape) for r, x in zip(result.split(sizes), values, strict=True)] if whitens else None
        results = results or [result] * processes
    shares = [
        (r * factor if r.shape == factor.shape else r * (1.0 + rank)).sum()
        for rank, (r, (_, factor)) in enumerate(zip(results, parts, strict=True))
    ]
    grads = torch.autograd.grad(sum(shares), values)
    return [(r.detach(), grad) for r, grad in zip(results, grads, strict=True)]


MOMENT_CASES = [(*case, dtype, kind) for case in MOMENTS for dtype in DTYPES for kind in MASKS]


def work(rank, folder):
    group = torch.distributed.group.WORLD
    return {"moments": [moments_case(rank, *case, group) for case in MOMENT_CASES]}


def work_of_three(rank, folder):
    return work(rank, folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = process_group.run(__file__, {"work": 2, "work_of_three": 3}, tmp_path_factory.mktemp("groups"))
    return {2: found["work"], 3: found["work_of_three"]}


def assert_close(got, expected, dtype):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if dtype == torch.bfloat16 and got.dtype == torch.bfloat16:  # gradients, rounded once from float32 or float64
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6)
    else:
        # gradients of whitening are differences of numbers around 1
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got, expected, rtol=10 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("case", MOMENT_CASES, ids=str)
def test_moments_are_those_of_all_tokens(results, processes, case):
    index, name, dtype = MOMENT_CASES.index(case), case[0], case[2]
    for rank, expected in enumerate(moments_of_all(processes, *case)):
        result, grad = results[processes][rank]["moments"][index]
        assert_close(result, expected[0], dtype)
        assert_close(grad, expected[1], dtype)
        if name == "masked_mean":
            assert_same_bits(str(case), result, results[processes][0]["moments"][index][0])
