"""kl_rewards against float64, a hand-worked case and TRL, and on everything a caller may pass."""

import math

import pytest
import torch
from cases import FLOATS, TOKEN_SHAPES, token_inputs
from conftest import assert_same_bits, assert_within_torch_error, require_trl

import ppo_ext
from ppo_ext.ops import reference

PENALTIES = ("kl", "abs", "mse", "full")
NAMES = ("rewards", "non_score_rewards", "kls")


def run(inputs, kl_penalty="kl", op=ppo_ext.kl_rewards):
    kls = inputs["advantages"] if kl_penalty == "full" else None
    return op(
        inputs["scores"],
        inputs["logprobs"],
        inputs["ref_logprobs"],
        inputs["mask"],
        kl_coef=0.2,
        kl_penalty=kl_penalty,
        kls=kls,
    )


@pytest.mark.parametrize("kl_penalty", PENALTIES)
@pytest.mark.parametrize("shape", TOKEN_SHAPES, ids=str)
def test_matches_float64(device, shape, kl_penalty):
    inputs = token_inputs(shape, device)
    exact = run({k: v.double() for k, v in inputs.items()}, kl_penalty, reference.kl_rewards)
    torchs = run(inputs, kl_penalty, reference.kl_rewards)
    for name, a, b, c in zip(NAMES, run(inputs, kl_penalty), torchs, exact):
        assert a.dtype == torch.float32
        assert_within_torch_error(name, a, b, c)


def test_hand_worked_case(device):
    rewards, non_score_rewards, kls = ppo_ext.kl_rewards(
        torch.tensor([1.0], device=device),
        torch.tensor([[-1.0, -2.0, -3.0]], device=device),
        torch.tensor([[-1.5, -2.0, -1.0]], device=device),
        torch.tensor([[1, 1, 0]], device=device),
        kl_coef=0.5,
    )
    assert rewards.tolist() == [[-0.25, 1.0, 0.0]]
    assert non_score_rewards.tolist() == [[-0.25, 0.0, 0.0]]
    assert kls.tolist() == [[0.5, 0.0, 0.0]]


def test_score_lands_on_the_last_counted_token(device):
    mask = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], device=device)
    zero = torch.zeros(4, 5, device=device)
    rewards = ppo_ext.kl_rewards(torch.arange(1.0, 5.0, device=device), zero, zero, mask, kl_coef=0.1)[0]
    assert rewards.tolist() == [[0, 0, 0, 1, 0], [2, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 4]]


@pytest.mark.parametrize("kl_penalty", PENALTIES)
def test_masked_tokens_do_not_matter(device, kl_penalty):
    inputs = token_inputs((5, 70), device)
    inputs["mask"] = (torch.rand(5, 70, device=device) > 0.4).long()
    expected = run(inputs, kl_penalty)
    for value in (math.nan, math.inf):
        for name in ("logprobs", "ref_logprobs", "advantages"):
            inputs[name] = inputs[name].masked_fill(inputs["mask"] == 0, value)
        for a, b in zip(run(inputs, kl_penalty), expected):
            assert_same_bits("spoilt", a, b)
    assert all((x[inputs["mask"] == 0] == 0).all() for x in expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_and_views(device, dtype):
    inputs = token_inputs((6, 33), device, dtype)
    expected = run({k: v.clone() for k, v in inputs.items()})
    assert expected[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    views = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in inputs.items()}
    for a, b in zip(run(views), expected):
        assert_same_bits("view", a, b)


def test_opcheck(device):
    x = {k: v.contiguous() for k, v in token_inputs((4, 9), device).items()}
    for penalty in range(4):
        torch.library.opcheck(
            torch.ops.ppo_ext._kl_rewards.default,
            (x["scores"], x["logprobs"], x["ref_logprobs"], x["mask"].bool(), 0.2, penalty),
        )


def test_rejects_bad_arguments(device):
    x, scores = torch.zeros(4, 7, device=device), torch.zeros(4, device=device)
    cases = [
        (
            TypeError,
            "kl_rewards: scores must be float32, bfloat16, float16 or float64, got torch.int64",
            (scores.long(), x, x, x),
            {},
        ),
        (
            ValueError,
            r"kl_rewards: scores must have the shape \[4\] of the first dimension of logprobs, got \[3\]",
            (scores[:3], x, x, x),
            {},
        ),
        (
            ValueError,
            r"kl_rewards: ref_logprobs must have the shape \[4, 7\] of logprobs, got \[4, 6\]",
            (scores, x, x[:, 1:], x),
            {},
        ),
        (
            ValueError,
            r"kl_rewards: mask must have the shape \[4, 7\] of logprobs, got \[4\]",
            (scores, x, x, scores),
            {},
        ),
        (
            ValueError,
            r"kl_rewards: logprobs must have the shape \[B, T\], got \[4\]",
            (scores, scores, scores, scores),
            {},
        ),
        (
            ValueError,
            "kl_rewards: kl_penalty must be one of 'kl', 'abs', 'mse', 'full', 'k3', 'low_var_kl', got 'k9'",
            (scores, x, x, x),
            {"kl_penalty": "k9"},
        ),
        (
            ValueError,
            "kl_rewards: kls must be given for kl_penalty 'full' and for no other, got none with 'full'",
            (scores, x, x, x),
            {"kl_penalty": "full"},
        ),
        (
            ValueError,
            "kl_rewards: kls must be given for kl_penalty 'full' and for no other, got one with 'kl'",
            (scores, x, x, x),
            {"kls": x},
        ),
        (ValueError, "kl_rewards: kl_coef must be a finite number, got nan", (scores, x, x, x), {"kl_coef": math.nan}),
    ]
    for kind, text, arguments, options in cases:
        with pytest.raises(kind, match=text):
            ppo_ext.kl_rewards(*arguments, **{"kl_coef": 0.1, **options})


@pytest.mark.parametrize("kl_penalty", ("kl", "abs", "mse"))
@pytest.mark.parametrize("op", (ppo_ext.kl_rewards, reference.kl_rewards))
def test_equals_trl(kl_penalty, op):
    trl = require_trl()
    inputs = token_inputs((6, 40))
    stub = type(
        "Trainer",
        (),
        {
            "config": type("Config", (), {"kl_penalty": kl_penalty})(),
            "_kl_penalty": trl.PPOTrainer._kl_penalty,
            "kl_ctl": type("KL", (), {"value": 0.2})(),
        },
    )()
    theirs = trl.PPOTrainer.compute_rewards(
        stub, inputs["scores"], inputs["logprobs"], inputs["ref_logprobs"], inputs["mask"]
    )
    counts = inputs["mask"] == 1
    for name, a, b in zip(NAMES, run(inputs, kl_penalty, op), theirs):
        torch.testing.assert_close(a[counts], b[counts], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("kl_penalty", ("k3", "low_var_kl"))
@pytest.mark.parametrize("library", (ppo_ext, reference), ids=("ppo_ext", "reference"))
def test_numbers_of_k3(library, kl_penalty):
    d = torch.tensor([[0.1, 0.3, -0.5], [0.2, -0.2, 2.3]])
    arguments = (torch.zeros(2), d - 1.0, torch.full_like(d, -1.0), torch.ones(2, 3))
    kls = library.kl_rewards(*arguments, kl_coef=0.5, kl_penalty=kl_penalty)[2]
    expected = torch.tensor([[0.004837, 0.040818, 0.148721], [0.018731, 0.021403, 1.400259]])
    torch.testing.assert_close(kls, expected, rtol=0, atol=1e-6)
