"""ppo_loss against float64, a hand-worked case and TRL, and on everything a caller may pass."""

import math

import pytest
import torch
from cases import FLOATS, TOKEN_SHAPES, token_inputs
from conftest import assert_same_bits, assert_same_bits_for_any_threads, assert_within_torch_error, require_trl

import ppo_ext
from ppo_ext.ops import reference
from ppo_ext.ops.ppo_loss import STAT_NAMES

ORDER = ("logprobs", "old_logprobs", "advantages", "vpreds", "values", "returns", "mask")


def run(inputs, op=ppo_ext.ppo_loss, grad=1.0, **options):
    """The loss, the statistics, and the gradients of `grad` times the loss."""
    inputs = {k: inputs[k].detach().clone() for k in ORDER}
    logprobs, vpreds = inputs["logprobs"].requires_grad_(), inputs["vpreds"].requires_grad_()
    loss, stats = op(*inputs.values(), **options)
    (grad * loss).backward()
    return {"loss": loss.detach(), **stats, "grad_logprobs": logprobs.grad, "grad_vpreds": vpreds.grad}


def exact(inputs, **options):
    return run({k: v if k == "mask" else v.double() for k, v in inputs.items()}, reference.ppo_loss, **options)


@pytest.mark.parametrize("shape", TOKEN_SHAPES, ids=str)
def test_matches_float64(device, shape):
    inputs = token_inputs(shape, device)
    options = {"grad": 3.7, "cliprange": 0.15, "cliprange_value": 0.25, "vf_coef": 0.3}
    ours, torchs, truth = run(inputs, **options), run(inputs, reference.ppo_loss, **options), exact(inputs, **options)
    assert list(ours) == list(torchs)
    for name in ours:
        assert ours[name].dtype == torch.float32 and not ours[name].requires_grad
        scale = 0.0 if ours[name].dim() else 1.0  # a mean of terms of order one
        assert_within_torch_error(name, ours[name], torchs[name], truth[name], scale=scale)


def test_hand_worked_case(device):
    """Two tokens that count: a ratio above the clip range, and one within it with a value outside of its clip range."""
    log = math.log

    def row(*numbers):
        return torch.tensor([numbers], dtype=torch.float32, device=device)

    inputs = {
        "logprobs": row(log(2.0), log(1.1), 9.0),
        "old_logprobs": row(0, 0, 0),
        "advantages": row(1.0, 2.0, 9.0),
        "vpreds": row(0.1, 1.0, 9.0),
        "values": row(0, 0, 0),
        "returns": row(0.0, 1.5, 9.0),
        "mask": row(1, 1, 0),
    }
    result = run(inputs, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)
    pg_loss = (-1.2 - 2.2) / 2
    vf_loss = 0.5 * (0.1**2 + 1.3**2) / 2
    expected = {
        "loss/policy": pg_loss,
        "loss/value": vf_loss,
        "loss/total": pg_loss + 0.1 * vf_loss,
        "policy/approxkl": 0.5 * (log(2.0) ** 2 + log(1.1) ** 2) / 2,
        "policy/policykl": -(log(2.0) + log(1.1)) / 2,
        "policy/clipfrac": 0.5,
        "policy/advantages_mean": 1.5,
        "policy/ratio_mean": 1.55,
        "policy/skipped": 0.0,
        "returns/mean": 0.75,
        "returns/var": 1.125,
        "val/vpred": 0.55,
        "val/error": (0.01 + 0.25) / 2,
        "val/clipfrac": 0.5,
        "val/mean": 0.0,
        "val/var": 0.0,
    }
    assert {k: result[k].item() for k in STAT_NAMES} == pytest.approx(expected, abs=1e-6)
    assert result["grad_logprobs"].tolist()[0] == pytest.approx([0.0, -2.0 * 1.1 / 2, 0.0], abs=1e-6)
    assert result["grad_vpreds"].tolist()[0] == pytest.approx([0.1 * 0.1 / 2, 0.0, 0.0], abs=1e-6)


def test_gradcheck_float64(device):
    inputs = token_inputs((3, 5), device, torch.float64)
    logprobs, vpreds = inputs["logprobs"].requires_grad_(), inputs["vpreds"].requires_grad_()
    rest = [inputs[k] for k in ORDER]

    def loss(logprobs, vpreds):
        return ppo_ext.ppo_loss(logprobs, rest[1], rest[2], vpreds, *rest[4:])[0]

    assert torch.autograd.gradcheck(loss, (logprobs, vpreds))


def test_ties_as_in_torch(device):
    """Ratios of 1 and at both bounds, advantages of 0, values at both bounds: the gradient is that of autograd."""
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.75, 2.0], dtype=torch.float64)
    advantages = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    gap = torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.5], dtype=torch.float64)
    returns = torch.tensor([-1.0, 0.0, 0.125, 1.0], dtype=torch.float64)
    grid = torch.cartesian_prod(ratio.log(), advantages, gap, returns).to(device)
    zero = torch.zeros_like(grid[:, 0])
    inputs = {
        "logprobs": grid[:, 0],
        "old_logprobs": zero,
        "advantages": grid[:, 1],
        "vpreds": grid[:, 2],
        "values": zero,
        "returns": grid[:, 3],
        "mask": torch.ones_like(zero),
    }
    options = {"cliprange": 0.5, "cliprange_value": 0.25}
    ours, theirs = run(inputs, **options), run(inputs, reference.ppo_loss, **options)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-14, msg=name)


def test_masked_tokens_do_not_matter(device):
    inputs = token_inputs((5, 70), device)
    inputs["mask"] = (torch.rand(5, 70, device=device) > 0.4).long()
    expected = run(inputs)
    for value in (math.nan, math.inf, -math.inf):
        spoilt = {
            k: v if k == "mask" else v.masked_fill(inputs["mask"] == 0, value) for k, v in inputs.items() if k in ORDER
        }
        for name, result in run(spoilt).items():
            assert_same_bits(name, result, expected[name])
    for name in ("policy/ratio", "policy/advantages", "grad_logprobs", "grad_vpreds"):
        assert (expected[name][inputs["mask"] == 0] == 0).all()


def test_nothing_counts(device):
    inputs = token_inputs((2, 3), device)
    inputs["mask"][:] = 0
    assert all((x == 0).all() for x in run(inputs).values())


def test_one_token(device):
    result = run(token_inputs((1, 1), device) | {"mask": torch.ones(1, 1, device=device)})
    assert all(torch.isfinite(x).all() for x in result.values()) and result["returns/var"] == 0


def test_ratio_threshold_skips_exactly(device):
    inputs = token_inputs((4, 9), device)
    inputs["mask"][:] = 1
    inputs["logprobs"][1, 2] = 200.0  # its ratio is inf
    result = run(inputs, ratio_threshold=10.0)
    assert result["policy/skipped"] == 1 and result["loss"] == 0 and result["loss/policy"] == 0
    assert (result["grad_logprobs"] == 0).all() and (result["grad_vpreds"] == 0).all()
    inputs["logprobs"][1, 2] = inputs["old_logprobs"][1, 2]
    assert run(inputs, ratio_threshold=10.0)["policy/skipped"] == 0


@pytest.mark.parametrize("enabled", (True, False))
def test_the_grad_mode_stays_and_reaches_no_statistic(enabled, device):
    inputs = {name: token_inputs((3, 5), device)[name] for name in ORDER}
    with torch.set_grad_enabled(enabled):
        loss, stats = ppo_ext.ppo_loss(**inputs | {"advantages": inputs["advantages"].requires_grad_()})
        assert not loss.requires_grad and not any(x.requires_grad for x in stats.values())
        with pytest.raises(ValueError, match="values must have the shape"):
            ppo_ext.ppo_loss(**inputs | {"values": inputs["values"][:2]})
        assert torch.is_grad_enabled() == enabled


def test_exploded_ratio_that_is_clipped_has_no_gradient(device):
    inputs = token_inputs((1, 4), device)
    inputs["mask"][:] = 1
    inputs["advantages"][:] = 1.0
    inputs["logprobs"][0, 1] = 200.0
    result = run(inputs)
    assert torch.isfinite(result["grad_logprobs"]).all() and result["grad_logprobs"][0, 1] == 0


@pytest.mark.parametrize("name", ORDER[:-1])
def test_nan_shows(device, name):
    inputs = token_inputs((4, 9), device)
    inputs["mask"][:] = 1
    inputs[name][2, 3] = math.nan
    result = run(inputs)
    assert result["loss"].isnan()
    spoilt = result["grad_logprobs"] if "logprobs" in name or name == "advantages" else result["grad_vpreds"]
    assert spoilt[2, 3].isnan() and spoilt.isnan().sum() == 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_and_views(device, dtype):
    inputs = {k: token_inputs((6, 33), device, dtype)[k] for k in ORDER}
    expected = run(inputs)
    assert expected["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert expected["grad_logprobs"].dtype == dtype
    views = {k: v.t().contiguous().t() for k, v in inputs.items()}
    for name, result in run(views).items():
        assert_same_bits(name, result, expected[name])


def test_same_bits_for_any_threads(device):
    inputs = token_inputs((64, 2048), device)
    assert_same_bits_for_any_threads(lambda: run(inputs))


def test_no_second_derivative(device):
    inputs = {k: token_inputs((2, 3), device)[k] for k in ORDER}
    logprobs = inputs["logprobs"].requires_grad_()
    weight = torch.ones((), device=device, requires_grad=True)
    loss = weight * ppo_ext.ppo_loss(*inputs.values())[0]
    with pytest.raises(RuntimeError, match="ppo_loss: .* differentiable once"):
        torch.autograd.grad(loss, logprobs, create_graph=True)
    (grad,) = torch.autograd.grad(ppo_ext.ppo_loss(*inputs.values())[0], logprobs, create_graph=True)
    assert not grad.requires_grad


def test_opcheck(device):
    inputs = {k: token_inputs((4, 9), device)[k] for k in ORDER}
    inputs["mask"] = inputs["mask"].bool()
    ops = torch.ops.ppo_ext
    torch.library.opcheck(ops._ppo_loss.default, (*inputs.values(), 0.2, 0.2, 0.1, 10.0))
    loss, stats, _, _, grad_logprobs, grad_vpreds = ops._ppo_loss(*inputs.values(), 0.2, 0.2, 0.1, 10.0)
    torch.library.opcheck(ops._ppo_loss_backward.default, (loss, stats, grad_logprobs, grad_vpreds))


def test_compiles_into_one_graph(device):
    inputs = {k: token_inputs((4, 9), device)[k] for k in ORDER}
    compiled = torch.compile(ppo_ext.ppo_loss, fullgraph=True, backend="aot_eager")
    expected = run(inputs)
    for name, value in run(inputs, compiled).items():
        assert_same_bits(name, value, expected[name])


def test_rejects_bad_arguments(device):
    good = {k: token_inputs((4, 7), device)[k] for k in ORDER}
    cases = [
        (
            TypeError,
            "ppo_loss: vpreds must be float32, bfloat16, float16 or float64, got torch.int64",
            {"vpreds": good["mask"]},
            {},
        ),
        (TypeError, "ppo_loss: mask must be a torch.Tensor, got NoneType", {"mask": None}, {}),
        (
            ValueError,
            r"ppo_loss: returns must have the shape \[4, 7\] of logprobs, got \[4, 6\]",
            {"returns": good["returns"][:, 1:]},
            {},
        ),
        (
            ValueError,
            r"ppo_loss: mask must have the shape \[4, 7\] of logprobs, got \[4\]",
            {"mask": good["mask"][:, 0]},
            {},
        ),
        (
            ValueError,
            "ppo_loss: values must be on the device .* of logprobs, got meta",
            {"values": good["values"].to("meta")},
            {},
        ),
        (ValueError, "ppo_loss: cliprange must be finite and not negative, got -0.1", {}, {"cliprange": -0.1}),
        (
            ValueError,
            "ppo_loss: cliprange_value must be finite and not negative, got nan",
            {},
            {"cliprange_value": math.nan},
        ),
        (ValueError, "ppo_loss: vf_coef must be a finite number, got inf", {}, {"vf_coef": math.inf}),
    ]
    for kind, text, changed, options in cases:
        with pytest.raises(kind, match=text):
            ppo_ext.ppo_loss(*(good | changed).values(), **options)


@pytest.mark.parametrize("op", (ppo_ext.ppo_loss, reference.ppo_loss))
def test_equals_trl(op):
    trl = require_trl()
    inputs = token_inputs((6, 40))
    config = type("Config", (), {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "ratio_threshold": 10.0})()
    logprobs, vpreds = inputs["logprobs"].clone().requires_grad_(), inputs["vpreds"].clone().requires_grad_()
    stub, logits = type("Trainer", (), {"config": config})(), torch.randn(6, 40, 5)
    pg_loss, vf_loss, stats = trl.PPOTrainer.loss(
        stub,
        inputs["old_logprobs"],
        inputs["values"],
        logits,
        vpreds,
        logprobs,
        inputs["mask"],
        inputs["advantages"],
        inputs["returns"],
    )
    (pg_loss + vf_loss).backward()
    ours = run(inputs, op)
    counts = inputs["mask"] == 1
    torch.testing.assert_close(ours["grad_logprobs"], logprobs.grad)
    torch.testing.assert_close(ours["grad_vpreds"], vpreds.grad)
    assert set(stats) - set(ours) == {"policy/entropy"}
    for name, theirs in stats.items():
        if name != "policy/entropy":
            a, b = (x[counts] if x.dim() else x for x in (ours[name], theirs))
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
