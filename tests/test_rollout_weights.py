"""rollout_weights: worked cases, the reference, and any values."""

import math

import pytest
import torch
from conftest import assert_same_bits, assert_same_bits_for_any_threads

import ppo_ext
from ppo_ext.ops import reference

OLD = [[-1.4, -0.4, -2.0], [-0.3, -2.7, -9.0]]
ROLLOUT = [[-1.2, -0.4, -1.2], [-0.9, -0.6, -5.0]]
MASK = [[1, 1, 1], [1, 1, 0]]
OPS = pytest.mark.parametrize("op", (ppo_ext.rollout_weights, reference.rollout_weights), ids=("op", "reference"))


def run(op, device, old=OLD, rollout=ROLLOUT, mask=MASK, dtype=torch.float64, **options):
    tensors = [torch.tensor(x, dtype=dtype, device=device) for x in (old, rollout)]
    return op(*tensors, torch.tensor(mask, device=device), **options)


@OPS
@pytest.mark.parametrize(
    "options, weights",
    (
        ({}, [0.818731, 1, 0.449329, 1.822119, 0.122456, 0]),
        ({"bounds": (0.0, 1.5)}, [0.818731, 1, 0.449329, 1.5, 0.122456, 0]),
        ({"bounds": (0.5, 1.0)}, [0.818731, 1, 0.5, 1, 0.5, 0]),
        ({"kind": "icepop", "bounds": (0.5, 2.0)}, [0.818731, 1, 0, 1.822119, 0, 0]),
        ({"kind": "icepop", "bounds": (1.0, 1.0)}, [0, 1, 0, 0, 0, 0]),
        ({"level": "sequence"}, [0.367879, 0.367879, 0.367879, 0.22313, 0.22313, 0]),
        ({"level": "sequence", "kind": "icepop", "bounds": (0.3, 1.0)}, [0.367879, 0.367879, 0.367879, 0, 0, 0]),
        ({"level": "geometric", "kind": "icepop", "bounds": (0.6, 1.1)}, [0.716531] * 3 + [0] * 3),
    ),
)
def test_worked_cases(op, options, weights, device):
    assert run(op, device, **options)[0].flatten().tolist() == pytest.approx(weights, abs=1e-6)


@OPS
def test_statistics(op, device):
    _, stats = run(op, device, kind="icepop", bounds=(0.5, 2.0))
    expected = {"mean": 0.72817, "ess": 0.531247, "share_low": 0.4, "share_high": 0, "share_invalid": 0}
    assert {name: stats[name].item() for name in expected} == pytest.approx(expected, abs=1e-6)
    assert stats["ratio_max"].item() == pytest.approx(1.822119, abs=1e-6)


@OPS
@pytest.mark.parametrize("level", ("token", "sequence", "geometric"))
@pytest.mark.parametrize("kind", ("tis", "icepop"))
def test_finite_for_any_input(op, kind, level, device):
    values = [math.nan, math.inf, -math.inf, 3e38, -3e38, -1.0]
    old = [[x] * len(values) for x in values]
    rollout, mask = [values] * len(values), [[1] * len(values)] * len(values)
    weights, stats = run(op, device, old, rollout, mask, torch.float32, kind=kind, level=level)
    assert weights.isfinite().all() and (weights >= 0).all() and (weights <= 2).all()
    assert all(x.isfinite() for x in stats.values()) and stats["share_invalid"] > 0


@pytest.mark.parametrize("level", ("token", "sequence", "geometric"))
def test_masked_tokens_do_not_matter(level, device):
    old, rollout = (torch.randn(5, 300, device=device) / 30 for _ in range(2))
    mask = torch.rand(5, 300, device=device) > 0.3
    mask[3] = False
    expected, expected_stats = ppo_ext.rollout_weights(old, rollout, mask, level=level)
    assert (expected[~mask] == 0).all()
    for value in (math.nan, math.inf, 3e38):
        spoilt = old.masked_fill(~mask, value), rollout.masked_fill(~mask, -value)
        weights, stats = ppo_ext.rollout_weights(*spoilt, mask, level=level)
        assert_same_bits("weights", weights, expected)
        for name, x in stats.items():
            assert_same_bits(name, x, expected_stats[name])


def test_same_bits_for_any_threads(device):
    old, rollout = (torch.randn(64, 2000, device=device) for _ in range(2))

    def results():
        weights, stats = ppo_ext.rollout_weights(old, rollout, torch.ones(64, 2000, device=device))
        return {"weights": weights, **stats}

    assert_same_bits_for_any_threads(results)


def test_opcheck_and_compile(device):
    old, rollout, mask = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device), torch.ones(4, 9) > 0
    mask = mask.to(device)
    torch.library.opcheck(torch.ops.ppo_ext._rollout_weights.default, (old, rollout, mask, 1, 2, 0.5, 2.0))
    compiled = torch.compile(ppo_ext.rollout_weights, fullgraph=True, backend="aot_eager")
    expected = ppo_ext.rollout_weights(old, rollout, mask, level="geometric")[0]
    assert_same_bits("weights", compiled(old, rollout, mask, level="geometric")[0], expected)


def test_rejects_bad_arguments(device):
    for options, kind, text in (
        ({"kind": "mis"}, ValueError, "kind must be one of 'tis', 'icepop', got 'mis'"),
        ({"level": None}, TypeError, "level must be a str, got NoneType"),
        ({"bounds": 2.0}, TypeError, r"bounds must be a pair \(low, high\), got float"),
        ({"bounds": (2.0, 1.0)}, ValueError, r"bounds must have low <= high, got \(2.0, 1.0\)"),
        ({"bounds": (0.0, math.inf)}, ValueError, "bounds must be finite and not negative, got inf"),
    ):
        with pytest.raises(kind, match=f"^rollout_weights: {text}"):
            run(ppo_ext.rollout_weights, device, **options)
