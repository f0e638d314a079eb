"""masked_mean, masked_var and masked_whiten against float64 and TRL, and on everything a caller may pass."""

import math

import pytest
import torch
from cases import FLOATS, TOKEN_SHAPES
from conftest import assert_same_bits, assert_same_bits_for_any_threads, assert_within_torch_error, require_trl

import ppo_ext
from ppo_ext.ops import reference

OPS = {
    "mean": (ppo_ext.masked_mean, reference.masked_mean, {}),
    "mean by row": (ppo_ext.masked_mean, reference.masked_mean, {"axis": 1}),
    "mean by column": (ppo_ext.masked_mean, reference.masked_mean, {"axis": 0}),
    "mean by both": (ppo_ext.masked_mean, reference.masked_mean, {"axis": (0, -1)}),
    "var": (ppo_ext.masked_var, reference.masked_var, {}),
    "biased var": (ppo_ext.masked_var, reference.masked_var, {"unbiased": False}),
    "whiten": (ppo_ext.masked_whiten, reference.masked_whiten, {}),
    "keep mean": (ppo_ext.masked_whiten, reference.masked_whiten, {"shift_mean": False}),
    "scale": (ppo_ext.masked_whiten, reference.masked_whiten, {"mode": "scale"}),
    "scale, biased": (ppo_ext.masked_whiten, reference.masked_whiten, {"mode": "scale", "unbiased": False, "eps": 0.1}),
    "biased": (ppo_ext.masked_whiten, reference.masked_whiten, {"unbiased": False, "eps": 1e-5}),
}


def each_op(function):
    return pytest.mark.parametrize("name", OPS)(function)


@each_op
@pytest.mark.parametrize("shape", TOKEN_SHAPES, ids=str)
def test_matches_float64(device, name, shape):
    op, spec, options = OPS[name]
    values, mask = 3.0 + torch.randn(shape, device=device), torch.rand(shape, device=device) > 0.4
    exact = spec(values.double(), mask, **options)
    assert_within_torch_error(name, op(values, mask, **options), spec(values, mask, **options), exact)


@each_op
@pytest.mark.parametrize("shape", TOKEN_SHAPES[-2:], ids=str)
def test_grad_matches_float64(device, name, shape):
    op, spec, options = OPS[name]
    values, mask = 3.0 + torch.randn(shape, device=device), torch.rand(shape, device=device) > 0.4
    grad = torch.randn_like(op(values, mask, **options))

    def gradient(op, dtype):
        inputs = values.to(dtype).requires_grad_()
        return torch.autograd.grad(op(inputs, mask, **options), inputs, grad.to(dtype))[0]

    assert_within_torch_error(
        name, gradient(op, torch.float32), gradient(spec, torch.float32), gradient(spec, torch.float64)
    )


@each_op
def test_same_bits_for_any_threads(device, name):
    op, _, options = OPS[name]
    values, mask = torch.randn(64, 1025, device=device, requires_grad=True), torch.rand(64, 1025, device=device) > 0.4
    incoming = torch.randn_like(op(values, mask, **options))

    def run():
        result = op(values, mask, **options)
        return result.detach(), *torch.autograd.grad(result, values, incoming)

    assert_same_bits_for_any_threads(run)


@each_op
def test_large_mean_does_not_cancel(device, name):
    op, spec, options = OPS[name]
    values = 1e4 + torch.randn(50, 60, device=device).mul(64).round().div(64)
    mask = torch.rand(50, 60, device=device) > 0.4
    torch.testing.assert_close(
        op(values, mask, **options).double(), spec(values.double(), mask, **options), rtol=1e-5, atol=1e-5
    )


@each_op
def test_gradcheck_float64(device, name):
    op, _, options = OPS[name]
    values = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 1, 0]], device=device)
    assert torch.autograd.gradcheck(lambda x: op(x, mask, **options), values)


@each_op
def test_masked_entries_do_not_matter(device, name):
    op, _, options = OPS[name]
    values, mask = torch.randn(5, 70, device=device), torch.rand(5, 70, device=device) > 0.4
    expected = op(values, mask, **options)
    for value in (math.nan, math.inf):
        assert_same_bits(name, op(values.masked_fill(~mask, value), mask, **options), expected)


@each_op
@pytest.mark.parametrize("counted", (0, 1))
def test_few_entries_give_no_nan(device, name, counted):
    op, spec, options = OPS[name]
    values = torch.randn(4, 5, device=device, requires_grad=True)
    mask = torch.zeros(4, 5, device=device)
    mask[2, 3] = counted
    result = op(values, mask, **options)
    result.sum().backward()
    torch.testing.assert_close(result, spec(values, mask, **options), rtol=0, atol=1e-6)
    assert torch.isfinite(values.grad).all()
    if name in ("var", "whiten"):
        assert (result == 0).all()


@each_op
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_and_views(device, name, dtype):
    op, _, options = OPS[name]
    values, mask = torch.randn(6, 33, device=device).to(dtype), torch.rand(6, 33, device=device) > 0.4
    expected = op(values, mask, **options)
    assert expected.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same_bits(name, op(values.t().contiguous().t(), mask.int(), **options), expected)


def test_float_masks_weigh(device):
    values, weights = torch.randn(6, 33, device=device), torch.rand(6, 33, device=device)
    weights[weights < 0.3] = 0
    expected = (values * weights).sum() / weights.sum()
    torch.testing.assert_close(ppo_ext.masked_mean(values, weights), expected)


def test_mask_broadcasts(device):
    values = torch.arange(6.0, device=device).reshape(2, 3)
    assert ppo_ext.masked_mean(values, torch.tensor([[1, 0, 0]], device=device)).item() == 1.5


def test_opcheck(device):
    values, weights = torch.randn(4, 9, device=device), (torch.rand(4, 9, device=device) > 0.4).float()
    ops = torch.ops.ppo_ext
    torch.library.opcheck(ops._masked_moments.default, (values, weights))
    for options in ((0, True, 1e-8), (1, True, 1e-8), (2, False, 1e-5)):
        torch.library.opcheck(ops._masked_whiten.default, (values, weights, *options))
        whitened, moments = ops._masked_whiten(values, weights, *options)
        torch.library.opcheck(ops._masked_whiten_backward.default, (whitened, values, weights, moments, *options))


@each_op
def test_compiles_into_one_graph(device, name):
    op, _, options = OPS[name]
    values, mask = torch.randn(4, 9, device=device), torch.rand(4, 9, device=device) > 0.4
    torch.compiler.reset()
    compiled = torch.compile(lambda x: op(x, mask, **options), fullgraph=True, backend="aot_eager")
    assert_same_bits(name, compiled(values), op(values, mask, **options))


@each_op
def test_rejects_bad_arguments(device, name):
    op = OPS[name][0]
    values = torch.zeros(4, 7, device=device)
    with pytest.raises(
        TypeError, match=f"{op.__name__}: values must be float32, bfloat16, float16 or float64, got torch.int32"
    ):
        op(values.int(), values)
    with pytest.raises(TypeError, match=f"{op.__name__}: mask must be a torch.Tensor, got int"):
        op(values, 1)
    with pytest.raises(
        ValueError, match=rf"{op.__name__}: mask must broadcast to the shape \[4, 7\] of values, got \[4, 6\]"
    ):
        op(values, values[:, :6])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_equals_trl(dtype):
    core = require_trl().core
    values, mask = torch.randn(6, 33).to(dtype), (torch.rand(6, 33) > 0.4).long()
    counts = mask == 1
    for module in (ppo_ext, reference):
        torch.testing.assert_close(module.masked_mean(values, mask), core.masked_mean(values, mask))
        torch.testing.assert_close(module.masked_mean(values, mask, axis=1), core.masked_mean(values, mask, axis=1))
        for unbiased in (True, False):
            torch.testing.assert_close(
                module.masked_var(values, mask, unbiased), core.masked_var(values, mask, unbiased)
            )
        for shift_mean in (True, False):
            torch.testing.assert_close(
                module.masked_whiten(values, mask, shift_mean)[counts],
                core.masked_whiten(values, mask, shift_mean)[counts],
            )


@pytest.mark.parametrize("library", (ppo_ext, reference), ids=("ppo_ext", "reference"))
@pytest.mark.parametrize(
    "options, expected",
    (
        ({}, (-1.070935, -0.773453, -0.178489, 0.713957, 1.308921)),
        ({"mode": "center"}, (-1.070935, -0.773453, -0.178489, 0.713957, 1.308921)),
        ({"mode": "keep_mean"}, (3.529065, 3.826547, 4.421511, 5.313957, 5.908921)),
        ({"shift_mean": False}, (3.529065, 3.826547, 4.421511, 5.313957, 5.908921)),
        # 1, 2, 4, 7, 9 over the root of 11.3, and their distances from 4.6 over that of 9.04
        ({"mode": "scale"}, (0.297482, 0.594964, 1.189929, 2.082375, 2.677340)),
        ({"unbiased": False}, (-1.197342, -0.864747, -0.199557, 0.798228, 1.463418)),
        ({"unbiased": False, "eps": 2.26}, (-1.070935, -0.773453, -0.178489, 0.713957, 1.308921)),
    ),
    ids=str,
)
def test_numbers_of_whitening(library, options, expected):
    values, mask = torch.tensor([[1.0, 2, 4], [7, 9, math.nan]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    found = library.masked_whiten(values, mask, **options)
    torch.testing.assert_close(found.flatten(), torch.tensor([*expected, 0.0]), rtol=0, atol=2e-6)


def test_one_token_is_scaled_by_the_root_of_eps(device):
    values, mask = torch.tensor([3.0, 5.0], device=device), torch.tensor([1, 0], device=device)
    for unbiased in (True, False):
        found = ppo_ext.masked_whiten(values, mask, mode="scale", unbiased=unbiased, eps=0.25)
        assert found.tolist() == [6.0, 0.0]


def test_a_mode_that_contradicts_shift_mean():
    with pytest.raises(
        ValueError, match=r"^masked_whiten: mode must be 'keep_mean' or None if shift_mean is False, got"
    ):
        ppo_ext.masked_whiten(torch.zeros(2), torch.ones(2), False, mode="scale")
