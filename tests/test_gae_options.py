"""gae with a lambda by sequence, another lambda for the returns, a bootstrap and packed sequences."""

import os

import pytest
import torch
from cases import token_inputs
from conftest import assert_same_bits, assert_within_torch_error

import ppo_ext
from ppo_ext.ops import reference

LIBRARIES = pytest.mark.parametrize("library", (ppo_ext, reference), ids=("ppo_ext", "reference"))
VALUES = [[0.5, 0.2, -0.1], [0.4, 9.0, 0.6]]
MASK = [[1, 1, 1], [1, 0, 1]]


def both(library, values, rewards, mask, **options):
    return library.gae(torch.tensor(values), torch.tensor(rewards), torch.tensor(mask), gamma=0.9, **options)


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


# ---- the numbers of frameworks, with 0 at the masked token ----------------------------------------------------------


@LIBRARIES
def test_decoupled_lambda(library):
    rewards = [[0.0, 0, 1], [0, 0, 0.5]]
    advantages, returns = both(library, VALUES, rewards, MASK, lam=0.8, lam_returns=1.0)
    close(advantages, [[0.04144, 0.502, 1.1], [0.068, 0, -0.1]])
    close(returns, [[0.81, 0.9, 1.0], [0.45, 0, 0.5]])
    close(both(library, VALUES, rewards, MASK, lam=0.8)[1], [[0.54144, 0.702, 1.0], [0.468, 0, 0.5]])


@LIBRARIES
@pytest.mark.parametrize(
    "alpha, lam, expected",
    (
        (1.0, (2 / 3, 0.5), [[-0.098, 0.37, 1.1], [0.095, 0, -0.1]]),
        (0.05, (0.0, 0.0), [[-0.32, -0.29, 1.1], [0.14, 0, -0.1]]),
    ),
)
def test_length_adaptive_lambda(library, alpha, lam, expected):
    lams = ppo_ext.length_adaptive_lam(torch.tensor(MASK), alpha)
    close(lams, lam)
    close(both(library, VALUES, [[0.0, 0, 1], [0, 0, 0.5]], MASK, lam=lams)[0], expected)


@LIBRARIES
def test_bootstrap(library):
    """Where a response was cut off, the last token's next value is that of its last column."""
    values, mask = [[0.1, 0.5, 0.2, -0.1, 0.7], [0.3, 0.4, 9, 0.6, 0.8]], [[0, 1, 1, 1, 0], [0, 1, 0, 1, 0]]
    rewards = [[0.0, -0.02, -0.02, 0.98, 0], [0, -0.02, 0, 1.98, 0]]
    bootstrap = torch.tensor([0.7, 0.8])
    advantages, returns = both(library, values, rewards, mask, lam=0.8, bootstrap=bootstrap)
    close(advantages, [[0, 0.823264 - 0.5, 0.9212, 1.71, 0], [0, 1.632, 0, 2.1, 0]])
    close(returns, [[0, 0.823264, 1.1212, 1.61, 0], [0, 2.032, 0, 2.7, 0]])
    terminal = both(library, values, rewards, mask, lam=0.8, bootstrap=torch.zeros(2))
    for a, b in zip(terminal, both(library, values, rewards, mask, lam=0.8)):
        assert_same_bits("terminal", a, b)


def test_the_length_of_a_lambda():
    lams = ppo_ext.length_adaptive_lam(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [2, 0, 0, 0]]), 0.5)
    assert lams.tolist() == [0.5, 0.0, 0.0] and lams.dtype == torch.float32
    assert ppo_ext.length_adaptive_lam(torch.ones(2, 3), 0).tolist() == [0.0, 0.0]
    assert ppo_ext.length_adaptive_lam(torch.ones(1, 3), 3e38).tolist() == [1.0]
    with pytest.raises(ValueError, match=r"^length_adaptive_lam: mask must have the shape \[B, T\], got \[3\]$"):
        ppo_ext.length_adaptive_lam(torch.ones(3), 1.0)
    with pytest.raises(ValueError, match="^length_adaptive_lam: alpha must be finite and not negative, got -1.0$"):
        ppo_ext.length_adaptive_lam(torch.ones(1, 3), -1.0)


# ---- every way through the kernels ----------------------------------------------------------------------------------


def inputs_of(shape, device):
    inputs = token_inputs(shape, device)
    options = {"lam": torch.rand(shape[0], device=device), "bootstrap": torch.randn(shape[0], device=device)}
    return (inputs["values"], inputs["rewards"], (torch.rand(shape, device=device) > 0.3)), options


@pytest.mark.parametrize("shape", ((1, 1), (5, 33), (17, 64), (3, 1500), (40, 7)), ids=str)
@pytest.mark.parametrize("lam_returns", (None, 0.99))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_matches_float64(device, shape, lam_returns, dtype):
    tensors, options = inputs_of(shape, device)
    tensors = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
    options |= {"gamma": 0.97, "lam_returns": lam_returns}
    double = [x.double() if x.is_floating_point() else x for x in tensors]
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    found = (ppo_ext.gae(*tensors, **options), reference.gae(*tensors, **options), reference.gae(*double, **exact))
    for name, a, b, c in zip(("advantages", "returns"), *found):
        assert_within_torch_error(name, a, b, c, units=4, scale=4.0)


def test_the_same_lambda_twice_has_the_bits_of_one(device):
    tensors, options = inputs_of((20, 50), device)
    del options["lam"]
    one = ppo_ext.gae(*tensors, lam=0.9, **options)
    lams = torch.full((20,), 0.9, dtype=torch.float64, device=device)
    for more in ({"lam": 0.9, "lam_returns": 0.9}, {"lam": lams}, {"lam": lams, "lam_returns": 0.9}):
        for name, a, b in zip(("advantages", "returns"), ppo_ext.gae(*tensors, **options | more), one):
            assert_same_bits(name, a, b)


LENGTHS = ([3], [0, 5, 0, 40, 1, 17, 16, 33], [64] * 17, [700, 2, 1300], [0, 0], [])


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("lam_returns", (None, 1.0))
@pytest.mark.parametrize("masked", (True, False))
def test_packed_sequences_are_sequences_alone(device, lengths, lam_returns, masked):
    bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0).int()
    B, N = len(lengths), sum(lengths)
    values, rewards = torch.randn(N, device=device), torch.randn(N, device=device)
    mask = torch.rand(N, device=device) > 0.3 if masked else None
    lam, bootstrap = torch.rand(B, device=device), torch.randn(B, device=device)
    options = {"gamma": 0.97, "lam_returns": lam_returns}
    of_all = {"lam": lam, "bootstrap": bootstrap, "cu_seqlens": bounds}
    packed = ppo_ext.gae(values, rewards, mask, **of_all, **options)
    expected = reference.gae(values, rewards, mask, **of_all, **options)
    for a, b in zip(packed, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for b in range(B):
        part = slice(int(bounds[b]), int(bounds[b + 1]))
        tensors = (values[None, part], rewards[None, part], None if mask is None else mask[None, part])
        alone = ppo_ext.gae(*tensors, lam=lam[b : b + 1], bootstrap=bootstrap[b : b + 1], **options)
        for a, c in zip(packed, alone):
            if device == "cpu":  # on CUDA the number of threads, and so the order, follows from the mean length
                assert_same_bits("advantages, returns", a[part], c[0])
            else:
                torch.testing.assert_close(a[part], c[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("CUDA_ON_HOST_SEED" in os.environ, reason="the CUDA kernels do not look at the bounds")
@pytest.mark.parametrize(
    "bounds, text",
    (
        ([1, 6], r"cu_seqlens\[0\] must be 0, got 1"),
        ([0, 4, 3, 6], r"cu_seqlens\[2\] must not be less than the entry before it, got 3"),
        ([0, 7], r"cu_seqlens\[1\] must be the number of tokens 6, got 7"),
        ([0, 2, 5], r"cu_seqlens\[2\] must be the number of tokens 6, got 5"),
        ([0], r"cu_seqlens\[0\] must be the number of tokens 6, got 0"),
    ),
)
def test_bounds_that_are_none(bounds, text):
    with pytest.raises((ValueError, RuntimeError), match=f"^gae: {text}$"):
        ppo_ext.gae(torch.zeros(6), torch.zeros(6), cu_seqlens=torch.tensor(bounds))


def test_shapes_of_the_options():
    values = torch.zeros(2, 3)
    for name, x in (("lam", torch.ones(3)), ("bootstrap", torch.ones(2, 1)), ("lam", torch.ones(1, 2))):
        with pytest.raises(
            ValueError, match=rf"^gae: {name} must have the shape \[2\] of the first dimension of values"
        ):
            ppo_ext.gae(values, values, **{name: x})
    with pytest.raises(
        ValueError, match=r"^gae: values must have the shape \[N\] if cu_seqlens is given, got \[2, 3\]$"
    ):
        ppo_ext.gae(values, values, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"^gae: gamma \* lam_returns must lie in the range of float32, got"):
        ppo_ext.gae(values, values, gamma=2.0**100, lam=1.0, lam_returns=2.0**100)


def test_a_bootstrap_of_an_empty_sequence_is_not_read(device):
    values = torch.randn(2, 3, device=device)
    mask = torch.tensor([[0, 0, 0], [1, 0, 1]], device=device)
    bootstrap, lam = torch.tensor([float("nan"), 1.0], device=device), torch.tensor([float("nan"), 0.5], device=device)
    for result in ppo_ext.gae(values, values, mask, lam=lam, bootstrap=bootstrap, lam_returns=1.0):
        assert result.isfinite().all() and (result[mask == 0] == 0).all() and (result[mask == 1] != 0).all()


def test_opcheck_of_packed_sequences(device):
    values, bounds = torch.randn(6, device=device), torch.tensor([0, 2, 6], device=device)
    each = torch.rand(2, device=device)
    tensors = (values, values, values > 0, each, each, bounds)
    torch.library.opcheck(torch.ops.ppo_ext._gae.default, (*tensors, 0.9, 1.0, 0.8, True))
