"""gae against float64, a hand-worked case and TRL, and on everything a caller may pass."""

import math

import pytest
import torch
from cases import FLOATS, TOKEN_SHAPES, token_inputs
from conftest import assert_same_bits, assert_same_bits_for_any_threads, assert_within_torch_error, require_trl

import ppo_ext
from ppo_ext.ops import reference

OPTIONS = {"gamma": 0.97, "lam": 0.9}


def run(inputs, op=ppo_ext.gae, **options):
    return op(inputs["values"], inputs["rewards"], inputs["mask"], **(options or OPTIONS))


def exact(inputs, **options):
    return run({k: v.double() for k, v in inputs.items()}, reference.gae, **options)


@pytest.mark.parametrize("shape", TOKEN_SHAPES, ids=str)
@pytest.mark.parametrize("holes", (False, True))
def test_matches_float64(device, shape, holes):
    inputs = token_inputs(shape, device)
    if holes:
        inputs["mask"] = (torch.rand(shape, device=device) > 0.4).long()
    for name, a, b, c in zip(("advantages", "returns"), run(inputs), run(inputs, reference.gae), exact(inputs)):
        assert a.dtype == torch.float32
        assert_within_torch_error(name, a, b, c, units=2, scale=2.0)  # about the size of the terms


def test_hand_worked_case(device):
    """One reward, at the end, with gamma 1 and lam 1/2. The deltas are 1, 1 and 1; each advantage is its delta plus
    half the next."""
    values = torch.tensor([[1.0, 2.0, 3.0]], device=device)
    rewards = torch.tensor([[0.0, 0.0, 4.0]], device=device)
    advantages, returns = ppo_ext.gae(values, rewards, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[1.0 + 0.5 * 1.5, 1.0 + 0.5 * 1.0, 1.0]]
    assert returns.tolist() == [[2.75, 3.5, 4.0]]


def test_holes_are_as_if_deleted(device):
    inputs = token_inputs((1, 40), device)
    inputs["mask"] = (torch.rand(1, 40, device=device) > 0.5).long()
    kept = inputs["mask"][0] == 1
    dense = ppo_ext.gae(inputs["values"][:, kept], inputs["rewards"][:, kept], **OPTIONS)
    for name, a, b in zip(("advantages", "returns"), run(inputs), dense):
        torch.testing.assert_close(a[:, kept], b, rtol=1e-5, atol=1e-6, msg=name)
        assert (a[:, ~kept] == 0).all()


@pytest.mark.parametrize(
    "T, hole", [(500, (100, 300)), (3500, (900, 2100))]
)  # a warp takes tiles of 128 tokens, a block tiles of 1024
def test_a_hole_longer_than_a_tile(device, T, hole):
    inputs = token_inputs((3, T), device)
    inputs["mask"] = torch.ones(3, T, dtype=torch.int64, device=device)
    inputs["mask"][:, slice(*hole)] = 0
    for name, a, b in zip(("advantages", "returns"), run(inputs), exact(inputs)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5, msg=name)


def test_masked_tokens_do_not_matter(device):
    inputs = token_inputs((5, 70), device)
    inputs["mask"] = (torch.rand(5, 70, device=device) > 0.4).long()
    inputs["mask"][2] = 0
    expected = run(inputs)
    for value in (math.nan, math.inf):
        for name in ("values", "rewards"):
            inputs[name] = inputs[name].masked_fill(inputs["mask"] == 0, value)
        for a, b in zip(run(inputs), expected):
            assert_same_bits("spoilt", a, b)
    assert (expected[0][2] == 0).all()


def test_without_a_mask_all_tokens_count(device):
    inputs = token_inputs((3, 50), device)
    for a, b in zip(
        ppo_ext.gae(inputs["values"], inputs["rewards"]),
        ppo_ext.gae(inputs["values"], inputs["rewards"], torch.ones(3, 50, device=device)),
    ):
        assert_same_bits("mask", a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_and_views(device, dtype):
    inputs = token_inputs((6, 33), device, dtype)
    expected = run({k: v.clone() for k, v in inputs.items()})
    assert expected[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    views = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in inputs.items()}
    for a, b in zip(run(views), expected):
        assert_same_bits("view", a, b)


def test_misaligned_storage(device):
    inputs = token_inputs((6, 32), device)
    expected = run(inputs)
    for name in ("values", "rewards", "mask"):
        flat = torch.cat([inputs[name].new_zeros(1), inputs[name].flatten()])
        for a, b in zip(run(inputs | {name: flat[1:].view(6, 32)}), expected):
            assert_same_bits(f"{name} one entry into its storage", a, b)


def test_nan_spreads_to_earlier_tokens_of_its_row_only(device):
    inputs = token_inputs((3, 20), device)
    inputs["mask"][:] = 1
    clean = run(inputs)[0]
    inputs["rewards"][1, 10] = math.nan
    advantages = run(inputs)[0]
    assert advantages[1, :11].isnan().all()
    assert_same_bits("later", advantages[1, 11:], clean[1, 11:])
    assert_same_bits("other rows", advantages[[0, 2]], clean[[0, 2]])


def test_same_bits_for_any_threads(device):
    inputs = token_inputs((64, 4096), device)
    assert_same_bits_for_any_threads(lambda: run(inputs))


def test_detaches(device):
    inputs = token_inputs((2, 5), device)
    inputs["values"].requires_grad_()
    assert not any(x.requires_grad for x in run(inputs))


def test_opcheck(device):
    inputs = token_inputs((4, 9), device)
    for mask in (None, inputs["mask"].bool()):
        tensors = (inputs["values"], inputs["rewards"], mask)
        numbers = (0.9, 0.8, 1.0)
        torch.library.opcheck(torch.ops.ppo_ext._gae.default, (*tensors, None, None, None, *numbers, False))
        lams = torch.rand(4, device=device)
        torch.library.opcheck(torch.ops.ppo_ext._gae.default, (*tensors, lams, lams, None, *numbers, True))


def test_compiles_into_one_graph(device):
    inputs = token_inputs((4, 9), device)
    compiled = torch.compile(lambda v, r, m: ppo_ext.gae(v, r, m), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(inputs["values"], inputs["rewards"], inputs["mask"]), run(inputs, gamma=1.0, lam=0.95)):
        assert_same_bits("compiled", a, b)


def test_rejects_bad_arguments(device):
    x = torch.zeros(4, 7, device=device)
    cases = [
        (TypeError, "gae: values must be float32, bfloat16, float16 or float64, got torch.int64", (x.long(), x), {}),
        (TypeError, "gae: rewards must be a torch.Tensor, got float", (x, 1.0), {}),
        (ValueError, r"gae: rewards must have the shape \[4, 7\] of values, got \[4, 3\]", (x, x[:, :3]), {}),
        (ValueError, r"gae: values must have the shape \[B, T\], got \[28\]", (x.flatten(), x.flatten()), {}),
        (ValueError, r"gae: mask must have the shape \[4, 7\] of values, got \[7\]", (x, x, x[0]), {}),
        (ValueError, "gae: gamma must be a finite number, got nan", (x, x), {"gamma": math.nan}),
        (ValueError, "gae: lam must be a finite number, got inf", (x, x), {"lam": math.inf}),
        (ValueError, "gae: rewards must be on the device .* of values, got meta", (x, x.to("meta")), {}),
    ]
    for kind, text, arguments, options in cases:
        with pytest.raises(kind, match=text):
            ppo_ext.gae(*arguments, **options)


@pytest.mark.parametrize("op", (ppo_ext.gae, reference.gae))
def test_equals_trl_where_the_mask_is_one_block(op):
    trl = require_trl()
    inputs = token_inputs((6, 40))
    config = type("Config", (), {"whiten_rewards": False, "gamma": 0.97, "lam": 0.9})()
    stub = type("Trainer", (), {"config": config})()
    _, theirs, returns = trl.PPOTrainer.compute_advantages(stub, inputs["values"], inputs["rewards"], inputs["mask"])
    ours, our_returns = run(inputs, op)
    counts = inputs["mask"] == 1
    torch.testing.assert_close(our_returns[counts], returns[counts], rtol=1e-6, atol=1e-6)
    whitened = ppo_ext.masked_whiten(ours, inputs["mask"])
    torch.testing.assert_close(whitened[counts], theirs[counts], rtol=1e-5, atol=1e-5)
