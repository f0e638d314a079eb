"""Values with which loss code often fails (NaN, inf, -inf, subnormal, huge, empty), each with the exact result of the
op.

Most cases are worked out by hand: the arguments, and the results and gradients that follow.
"""

import math

import pytest
import torch
from cases import FLOATS, valid_arguments
from conftest import assert_same_bits
from ops import OF_HEAD, OPS

import ppo_ext

INF, NAN = math.inf, math.nan
TINY = 2.0**-149  # the smallest subnormal float32
NORMAL = 2.0**-126  # the smallest float32 that is not subnormal
BIG = torch.finfo(torch.float32).max
LN2, LN3 = math.log(2), math.log(3)

# The rows: op; what is hostile; arguments; the results that are compared. Lists are float32 tensors, labels int64.
ON_LOGITS = (
    (
        "logprobs_and_entropy",
        "-inf everywhere but at the label",
        {"logits": [[-INF, 2, -INF]], "labels": [1]},
        {"logprobs": [0], "entropy": [0], "grad_logits": [[0, 0, 0]]},
    ),
    (
        "logprobs_and_entropy",
        "-inf at the label and all but one",
        {"logits": [[-INF, 2, -INF]], "labels": [0]},
        {"logprobs": [-INF], "entropy": [0], "grad_logits": [[1, -1, 0]]},
    ),
    (
        "logprobs_and_entropy",
        "a row of nothing but -inf",
        {"logits": [[-INF, -INF], [0, 0]], "labels": [0, 1]},
        {"logprobs": [NAN, -LN2], "entropy": [NAN, LN2], "grad_logits": [[NAN, NAN], [-0.5, 0.5]]},
    ),
    (
        "logprobs_and_entropy",
        "a NaN logit",
        {"logits": [[0, NAN], [0, 0]], "labels": [0, 1]},
        {"logprobs": [NAN, -LN2], "entropy": [NAN, LN2], "grad_logits": [[NAN, NAN], [-0.5, 0.5]]},
    ),
    (
        "logprobs_and_entropy",
        "a +inf logit",
        {"logits": [[INF, 0], [0, 0]], "labels": [0, 1]},
        {"logprobs": [NAN, -LN2], "entropy": [NAN, LN2], "grad_logits": [[NAN, NAN], [-0.5, 0.5]]},
    ),
    (
        "logprobs_and_entropy",
        "subnormal logits and both zeros",
        {"logits": [[TINY, -TINY], [-0.0, 0.0]], "labels": [0, 1]},
        {"logprobs": [-LN2, -LN2], "entropy": [LN2, LN2], "grad_logits": [[0.5, -0.5], [-0.5, 0.5]]},
    ),
    (
        "logprobs_and_entropy",
        "the largest numbers",
        {"logits": [[BIG, -BIG], [BIG, -BIG]], "labels": [0, 1]},
        {"logprobs": [0, -INF], "entropy": [0, 0], "grad_logits": [[0, 0], [-1, 1]]},
    ),
    (
        "logprobs_and_entropy",
        "the most negative number for barred tokens",
        {"logits": [[0, -BIG, 0]], "labels": [2]},
        {"logprobs": [-LN2], "entropy": [LN2], "grad_logits": [[-0.5, 0, 0.5]]},
    ),
    (
        "logprobs_and_entropy",
        "a whole row of the largest number",
        {"logits": [[BIG, BIG]], "labels": [0]},
        {"logprobs": [-LN2], "entropy": [LN2], "grad_logits": [[0.5, -0.5]]},
    ),
    (
        "logprobs_and_entropy",
        "V = 1",
        {"logits": [[-123.0], [BIG]], "labels": [0, 0]},
        {"logprobs": [0, 0], "entropy": [0, 0], "grad_logits": [[0], [0]]},
    ),
    (
        "logprobs_and_entropy",
        "garbage under the mask",
        {"logits": [[NAN, INF], [0, 0], [-INF, -INF]], "labels": [-100, 1, 2**62], "mask": [0, 1, 0]},
        {"logprobs": [0, -LN2, 0], "entropy": [0, LN2, 0], "grad_logits": [[0, 0], [-0.5, 0.5], [0, 0]]},
    ),
    (
        "logprobs_and_entropy",
        "NaN, negative and subnormal masks",
        {"logits": [[0, 0]] * 3, "labels": [0] * 3, "mask": [NAN, -1, TINY]},
        {"logprobs": [-LN2] * 3, "entropy": [LN2] * 3, "grad_logits": [[0.5, -0.5]] * 3},
    ),
    (
        "logprobs_and_entropy",
        "the coldest temperature",
        {"logits": [[0, 1], [1, 1]], "labels": [0, 0], "temperature": 1e-30},
        {"logprobs": [-1e30, -LN2], "entropy": [0, LN2]},
    ),
    (
        "logprobs_and_entropy",
        "the hottest temperature",
        {"logits": [[0, 1e9, -INF]], "labels": [0], "temperature": 1e30},
        {"logprobs": [-LN2], "entropy": [LN2]},
    ),
    (
        "linear_logprobs_and_entropy",
        "-inf in the bias but at one token",
        {"hidden": [[1, 2]] * 2, "weight": [[1, 0], [0, 1], [1, 1]], "labels": [1, 0], "bias": [-INF, 0, -INF]},
        {"logprobs": [0, -INF], "entropy": [0, 0], "grad_bias": [1, -1, 0], "grad_hidden": [[0, 0], [1, -1]]},
    ),
    (
        "linear_logprobs_and_entropy",
        "a bias of nothing but -inf",
        {"hidden": [[1]], "weight": [[1], [0]], "labels": [1], "bias": [-INF, -INF]},
        {"logprobs": [NAN], "entropy": [NAN]},
    ),
    (
        "linear_logprobs_and_entropy",
        "NaN and infinite hidden states",
        {"hidden": [[NAN], [INF], [-INF], [0]], "weight": [[1], [2]], "labels": [0] * 4, "bias": [0, 0]},
        {"logprobs": [NAN, NAN, NAN, -LN2], "entropy": [NAN, NAN, NAN, LN2]},
    ),
    (
        "linear_logprobs_and_entropy",
        "V = 1 and H = 1",
        {"hidden": [[-123], [BIG]], "weight": [[1]], "labels": [0, 0], "bias": [5]},
        {"logprobs": [0, 0], "entropy": [0, 0], "grad_hidden": [[0], [0]], "grad_weight": [[0]], "grad_bias": [0]},
    ),
    (
        "linear_logprobs_and_entropy",
        "garbage under the mask",
        {
            "hidden": [[NAN], [0], [INF]],
            "weight": [[1], [3]],
            "labels": [-100, 1, 2**62],
            "bias": [0, 0],
            "mask": [0, 1, 0],
        },
        {"logprobs": [0, -LN2, 0], "entropy": [0, LN2, 0], "grad_hidden": [[0], [1], [0]], "grad_weight": [[0], [0]]},
    ),
    (
        "linear_logprobs_and_entropy",
        "a softcap of logits that are infinite",
        {"hidden": [[1]], "weight": [[1], [1]], "labels": [0], "bias": [INF, INF], "softcap": 2.0},
        {"logprobs": [-LN2], "entropy": [LN2], "grad_hidden": [[0]]},
    ),
    (
        "full_kl",
        "-inf in the policy adds nothing",
        {"logits": [[0, -INF]] * 2, "ref_logits": [[0, 0], [0, -INF]]},
        {"kl": [LN2, 0], "grad_logits": [[0, 0]] * 2},
    ),
    (
        "full_kl",
        "-inf in the reference where the policy has probability",
        {"logits": [[0, -INF]], "ref_logits": [[-INF, 0]]},
        {"kl": [INF]},
    ),
    (
        "full_kl",
        "a hopeless row of either",
        {
            "logits": [[-INF, -INF], [0, NAN], [0, INF], [0, 0], [0, 0], [0, 0]],
            "ref_logits": [[0, 0], [0, 0], [0, 0], [-INF, -INF], [NAN, 0], [0, 0]],
        },
        {"kl": [NAN] * 5 + [0]},
    ),
    (
        "full_kl",
        "huge and tiny logits",
        {"logits": [[1e38, -1e38], [NORMAL, 0]], "ref_logits": [[-1e38, 1e38], [0, NORMAL]]},
        {"kl": [2e38, 0]},
    ),
    (
        "full_kl",
        "garbage under the mask",
        {"logits": [[NAN, INF], [0, -INF]], "ref_logits": [[-INF, NAN], [0, 0]], "mask": [0, 1]},
        {"kl": [0, LN2], "grad_logits": [[0, 0]] * 2},
    ),
)
ON_TOKENS = (
    (
        "gae",
        "a NaN reward spreads to earlier tokens only",
        {"values": [[1, 2, 3]], "rewards": [[0, NAN, 0]], "gamma": 1, "lam": 1},
        {"advantages": [[NAN, NAN, -3]], "returns": [[NAN, NAN, 0]]},
    ),
    (
        "gae",
        "garbage under the mask, in a hole and at both ends",
        {
            "values": [[NAN, 1, INF, 2, -INF]],
            "rewards": [[INF, 1, NAN, 5, NAN]],
            "mask": [[0, 1, 0, 1, 0]],
            "gamma": 1,
            "lam": 1,
        },
        {"advantages": [[0, 5, 0, 3, 0]], "returns": [[0, 6, 0, 5, 0]]},
    ),
    (
        "gae",
        "an inf reward",
        {"values": [[0, 0]], "rewards": [[1, INF]], "gamma": 1, "lam": 1},
        {"advantages": [[INF, INF]], "returns": [[INF, INF]]},
    ),
    (
        "gae",
        "the largest numbers overflow to inf",
        {"values": [[0, 0]], "rewards": [[BIG, BIG]], "gamma": 1, "lam": 1},
        {"advantages": [[INF, BIG]], "returns": [[INF, BIG]]},
    ),
    (
        "gae",
        "subnormal numbers stay",
        {"values": [[0, TINY]], "rewards": [[TINY, 0]], "gamma": 1, "lam": 1},
        {"advantages": [[TINY, -TINY]], "returns": [[TINY, 0]]},
    ),
    (
        "gae",
        "gamma 0 and lam 0",
        {"values": [[1, 2]], "rewards": [[3, 4]], "gamma": 0, "lam": 0},
        {"advantages": [[2, 2]], "returns": [[3, 4]]},
    ),
    ("gae", "one token", {"values": [[1]], "rewards": [[3]]}, {"advantages": [[2]], "returns": [[3]]}),
    (
        "kl_rewards",
        "a NaN score goes to one token, or nowhere",
        {
            "scores": [NAN, NAN, 1],
            "logprobs": [[-1, -1]] * 3,
            "ref_logprobs": [[-1, -1]] * 3,
            "mask": [[1, 0], [0, 0], [0, 1]],
            "kl_coef": 0.5,
        },
        {"rewards": [[NAN, 0], [0, 0], [0, 1]], "kls": [[0, 0]] * 3, "non_score_rewards": [[0, 0]] * 3},
    ),
    (
        "kl_rewards",
        "infinite and NaN log-probabilities",
        {
            "scores": [0],
            "logprobs": [[-INF, -1, -INF, NAN]],
            "ref_logprobs": [[-1, -INF, -INF, -1]],
            "mask": [[1, 1, 1, 1]],
            "kl_coef": 0.5,
        },
        {
            "kls": [[-INF, INF, NAN, NAN]],
            "non_score_rewards": [[INF, -INF, NAN, NAN]],
            "rewards": [[INF, -INF, NAN, NAN]],
        },
    ),
    (
        "kl_rewards",
        "garbage under the mask",
        {
            "scores": [4],
            "logprobs": [[NAN, -1, INF]],
            "ref_logprobs": [[INF, -3, NAN]],
            "mask": [[0, 1, 0]],
            "kl_coef": 0.5,
            "kl_penalty": "mse",
        },
        {"kls": [[0, 2, 0]], "non_score_rewards": [[0, -1, 0]], "rewards": [[0, 3, 0]]},
    ),
    (
        "kl_rewards",
        "subnormal and huge differences",
        {
            "scores": [0, 0],
            "logprobs": [[0], [BIG]],
            "ref_logprobs": [[TINY], [-BIG]],
            "mask": [[1], [1]],
            "kl_coef": 1,
            "kl_penalty": "abs",
        },
        {"kls": [[TINY], [INF]], "rewards": [[-TINY], [-INF]]},
    ),
    (
        "kl_rewards",
        "log-probabilities are not looked at for 'full'",
        {
            "scores": [4],
            "logprobs": "garbage",
            "ref_logprobs": None,
            "mask": [[1, 0]],
            "kl_coef": 1,
            "kl_penalty": "full",
            "kls": [[2, NAN]],
        },
        {"kls": [[2, 0]], "rewards": [[2, 0]]},
    ),
    (
        "masked_mean",
        "garbage under the mask",
        {"values": [[NAN, 1, INF, 2, -INF]], "mask": [[0, 1, 0, 1, 0]]},
        {"mean": 1.5, "grad_values": [[0, 0.25, 0, 0.25, 0]]},
    ),
    (
        "masked_mean",
        "nothing counts in one row",
        {"values": [[NAN, NAN], [1, 3]], "mask": [[0, 0], [1, 1]], "axis": 1},
        {"mean": [0, 2], "grad_values": [[0, 0], [1, 1]]},
    ),
    (
        "masked_mean",
        "inf, both infs, NaN",
        {"values": [[INF, 1], [INF, -INF], [NAN, 1]], "mask": [[1, 1]], "axis": 1},
        {"mean": [INF, NAN, NAN], "grad_values": [[0.25, 0.25], [0.625, 0.625], [1, 1]]},
    ),
    ("masked_mean", "sums beyond float32", {"values": [[BIG, BIG]], "mask": [[1, 1]]}, {"mean": BIG}),
    (
        "masked_mean",
        "subnormal weights and values",
        {"values": [[3], [TINY]], "mask": [[TINY], [1]], "axis": 1},
        {"mean": [3, TINY]},
    ),
    ("masked_mean", "NaN weights", {"values": [[3, 1]], "mask": [[NAN, 1]]}, {"mean": NAN}),
    ("masked_var", "one token", {"values": [[NAN, 3]], "mask": [[0, 1]]}, {"var": 0, "grad_values": [[0, 0]]}),
    ("masked_var", "weights of less than one token", {"values": [[1, 3]], "mask": [[0.25, 0.25]]}, {"var": 0}),
    ("masked_var", "the same", {"values": [[1, 3]], "mask": [[0.25, 0.25]], "unbiased": False}, {"var": 1}),
    ("masked_var", "an inf value", {"values": [[INF, 3]], "mask": [[1, 1]]}, {"var": NAN}),
    ("masked_var", "nothing but one inf", {"values": [[INF]], "mask": [[1]], "unbiased": False}, {"var": NAN}),
    ("masked_var", "squares beyond float32", {"values": [[BIG, -BIG]], "mask": [[1, 1]]}, {"var": INF}),
    (
        "masked_whiten",
        "one token",
        {"values": [[NAN, 3]], "mask": [[0, 1]]},
        {"whitened": [[0, 0]], "grad_values": [[0, 0]]},
    ),
    (
        "masked_whiten",
        "one token, only scaled",
        {"values": [[NAN, 3]], "mask": [[0, 1]], "shift_mean": False},
        {"whitened": [[0, 3]]},
    ),
    ("masked_whiten", "equal values", {"values": [[7, 7, 7]], "mask": [[1, 1, 1]]}, {"whitened": [[0, 0, 0]]}),
    (
        "masked_whiten",
        "weights of less than one token",
        {"values": [[1, 1]], "mask": [[0.25, 0.25]]},
        {"whitened": [[0, 0]]},
    ),
    (
        "masked_whiten",
        "a NaN value",
        {"values": [[NAN, 3, 4]], "mask": [[1, 1, 0]]},
        {"whitened": [[NAN, NAN, 0]]},
    ),
)
# The arguments that a case does not give: two tokens, an unchanged policy, and values equal to the returns.
CALM = {
    "logprobs": [[-1, -1]],
    "old_logprobs": [[-1, -1]],
    "advantages": [[1, 1]],
    "vpreds": [[0, 0]],
    "values": [[0, 0]],
    "returns": [[0, 0]],
    "mask": [[1, 1]],
}
ON_LOSS = tuple(
    ("ppo_loss", what, CALM | arguments, results)
    for what, arguments, results in (
        ("nothing hostile", {}, {"loss": -1, "grad_logprobs": [[-0.25, -0.25]], "policy/ratio": [[1, 1]]}),
        (
            "an exploded ratio that is clipped",
            {"logprobs": [[200, -1]], "cliprange": 0.5},
            {"loss": -1.25, "policy/ratio": [[INF, 1]], "grad_logprobs": [[0, -0.25]]},
        ),
        (
            "an exploded ratio that is not",
            {"logprobs": [[200, -1]], "advantages": [[-1, 1]]},
            {"loss": INF, "grad_logprobs": [[INF, -0.25]]},
        ),
        (
            "an exploded ratio that skips",
            {"logprobs": [[200, -1]], "advantages": [[-1, 1]], "ratio_threshold": 10},
            {"loss": 0, "policy/skipped": 1, "grad_logprobs": [[0, 0]], "grad_vpreds": [[0, 0]]},
        ),
        (
            "probability 0 now",
            {"logprobs": [[-INF, -1]]},
            {"loss": -0.5, "policy/ratio": [[0, 1]], "grad_logprobs": [[0, -0.25]]},
        ),
        (
            "probability 0 now and before",
            {"logprobs": [[-INF, -1]], "old_logprobs": [[-INF, -1]]},
            {"loss": NAN, "grad_logprobs": [[NAN, -0.25]], "grad_vpreds": [[0, 0]]},
        ),
        ("an infinite advantage", {"advantages": [[INF, 1]]}, {"loss": -INF, "grad_logprobs": [[-INF, -0.25]]}),
        ("an infinite return", {"returns": [[INF, 0]]}, {"loss/value": INF, "grad_vpreds": [[-INF, 0]]}),
        ("a NaN value", {"values": [[NAN, 0]]}, {"loss/value": NAN, "loss/policy": -1, "grad_vpreds": [[NAN, 0]]}),
        (
            "garbage under the mask",
            {name: [[x[0][0], NAN]] for name, x in CALM.items()} | {"mask": [[1, 0]]},
            {
                "loss": -1,
                "grad_logprobs": [[-0.5, 0]],
                "grad_vpreds": [[0, 0]],
                "policy/ratio": [[1, 0]],
                "returns/var": 0,
            },
        ),
        (
            "nothing counts, garbage",
            {name: [[NAN, INF]] for name in CALM} | {"mask": [[0, 0]]},
            {"loss": 0, "grad_logprobs": [[0, 0]], "policy/ratio_mean": 0, "policy/skipped": 0, "val/var": 0},
        ),
        (
            "nothing counts, a threshold below 0",
            {"mask": [[0, 0]], "ratio_threshold": -1},
            {"loss": 0, "policy/skipped": 1},
        ),
        (
            "clip ranges of 0",
            {"logprobs": [[0, -1]], "vpreds": [[1, 0]], "cliprange": 0, "cliprange_value": 0},
            {"loss/policy": -1, "loss/value": 0.25, "grad_logprobs": [[0, -0.25]]},
        ),
        ("subnormal numbers", {"vpreds": [[TINY, 0]], "returns": [[TINY, 0]]}, {"loss/value": 0, "val/vpred": 0}),
    )
)
CASES = ON_LOGITS + ON_TOKENS + ON_LOSS


def tensor(name, value, device):
    if not isinstance(value, list):
        return value
    return torch.tensor(value, dtype=torch.int64 if name == "labels" else torch.float32, device=device)


@pytest.mark.parametrize("op, what, arguments, expected", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_hostile_values(device, op, what, arguments, expected):
    arguments = {name: tensor(name, value, device) for name, value in arguments.items()}
    ones = torch.ones(arguments["labels"].shape if "labels" in arguments else (), device=device)
    grads = {"logprobs": ones, "entropy": ones} if op.endswith("logprobs_and_entropy") else {"loss": ones / 2}
    results = OPS[op].run(arguments, grads)
    for name, value in expected.items():
        result, exact = results[name], torch.tensor(value, dtype=torch.float32, device=device)
        assert_same_bits(f"{name} {result.tolist()} instead of {value}", result, exact.expand(result.shape))


each_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", ((0, 3), (3, 0), (0, 0)), ids=str)
@each_op
def test_empty_batches_and_sequences(device, op, shape, dtype):
    arguments = valid_arguments(op, shape, device=device, dtype=dtype)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    for name, result in op.run(arguments).items():
        if name.startswith("grad_"):
            assert result.dtype == dtype and result.shape == arguments[name.removeprefix("grad_")].shape
        else:
            expected = (shape,) if name in op.per_token else ((),) if name in op.results else ((), shape)
            assert result.dtype == single and result.shape in expected, name
        assert (result == 0).all(), name


@each_op
def test_no_token_counts(device, op):
    arguments = valid_arguments(op, device=device)
    arguments = {
        name: torch.full_like(x, NAN) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    } | {"mask": torch.zeros(2, 3, device=device)}
    for name, result in op.run(arguments).items():
        assert (result == 0).all(), name


@each_op
def test_one_token_is_finite(device, op):
    arguments = valid_arguments(op, (1, 1), device=device) | {"mask": torch.ones(1, 1, device=device)}
    for name, result in op.run(arguments).items():
        assert torch.isfinite(result).all(), name


DIFFERENTIABLE = [op for op in OPS.values() if op.differentiable]


@pytest.mark.parametrize("garbage", (NAN, INF, -INF))
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_garbage_in_incoming_gradients(device, op, garbage):
    """The gradients of masked tokens are 0 for any incoming gradient: with garbage at masked tokens, or of an infinite
    loss."""
    arguments = valid_arguments(op, device=device) | ({"cliprange": BIG} if "cliprange" in op.arguments else {})
    mask = arguments["mask"] = torch.tensor([[1, 0, 1], [0, 0, 1]], device=device)
    clean = torch.ones((2, 3) if op.per_token else (), device=device)
    spoilt = clean.masked_fill(mask == 0, garbage) if op.per_token else clean * garbage
    results, expected = (op.run(arguments, dict.fromkeys(op.results, grad)) for grad in (spoilt, clean))
    for name in (f"grad_{name}" for name in op.differentiable if name not in OF_HEAD):
        assert (results[name][mask == 0] == 0).all(), name
        if op.per_token:
            assert_same_bits(name, results[name], expected[name])
        else:
            assert not torch.isfinite(results[name][mask == 1]).all(), name


@pytest.mark.parametrize("op", [op for op in DIFFERENTIABLE if op.per_token], ids=lambda op: op.name)
def test_incoming_gradients_of_any_strides(op):
    arguments = valid_arguments(op)
    for make in (lambda x: x.t().contiguous().t(), lambda x: x[:1, :1].expand(2, 3), lambda x: x.repeat(1, 2)[:, ::2]):
        grads = {name: make(torch.randn(2, 3)) for name in op.per_token}
        dense = {name: grad.clone(memory_format=torch.contiguous_format) for name, grad in grads.items()}
        expected = op.run(arguments, dense)
        for name, result in op.run(arguments, grads).items():
            assert_same_bits(name, result, expected[name])


@pytest.mark.parametrize("op", [op for op in OPS.values() if "labels" in op.arguments], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("label", (-100, -1, 7, 14, 2**40, 2**63 - 1, -(2**63)))
def test_ids_outside_the_vocabulary_are_never_read(op, dtype, label):
    arguments = valid_arguments(op, dtype=dtype) | ({"cliprange": BIG} if "cliprange" in op.arguments else {})
    arguments["mask"] = torch.ones(2, 3)
    arguments["labels"][1, 2] = label
    with pytest.raises(ValueError) as error:
        op.run(arguments)
    hint = "; leave rows without a label out by the mask" if label == -100 else ""
    assert str(error.value) == f"{op.name}: labels[1, 2] must be an id in [0, 7), got {label}{hint}"
    arguments["mask"][1, 2] = 0
    masked = op.run(arguments)
    arguments["labels"][1, 2] = 3
    for name, result in op.run(arguments).items():
        assert_same_bits(name, masked[name], result)
        if name.removeprefix("grad_") not in OF_HEAD and result.shape[:2] == (2, 3):
            assert (result[1, 2] == 0).all() and ((result[:, 0] != 0).any() or name == "is_top1"), name


def test_ids_outside_the_vocabulary_of_one_row():
    with pytest.raises(ValueError) as error:
        ppo_ext.logprobs(torch.zeros(7), torch.tensor(-100, dtype=torch.int32))
    sentence = "logprobs: labels[] must be an id in [0, 7), got -100; leave rows without a label out by the mask"
    assert str(error.value) == sentence


@each_op
def test_sizes_that_no_memory_holds(op):
    """Tensors of stride 0 can have 2^50 tokens. torch reports that there is not enough memory for the results; nothing
    crashes."""
    arguments = {
        name: x.flatten()[0].expand(*[2**25] * min(x.dim(), 2), *x.shape[2:])
        if isinstance(x, torch.Tensor) and name not in OF_HEAD
        else x
        for name, x in valid_arguments(op).items()
    }
    with pytest.raises(RuntimeError, match="allocate|memory"):
        op.run(arguments)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.rank is None], ids=lambda op: op.name)
def test_hundreds_of_dimensions(op):
    arguments = valid_arguments(op, (1, 1))
    rank = 300
    deep = {
        name: x.view([1] * (rank - 2) + list(x.shape)) if isinstance(x, torch.Tensor) and name not in OF_HEAD else x
        for name, x in arguments.items()
    }
    expected = op.outputs(arguments)
    for name, result in op.outputs(deep).items():
        assert_same_bits(name, result.flatten(), expected[name].flatten())


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.on_logits], ids=lambda op: op.name)
def test_more_leading_dimensions_than_the_kernels_follow(op):
    dims = 9
    arguments = op.pick({}, [2] * dims, vocabulary=5)
    logits = arguments["logits"].permute(*reversed(range(dims)), dims)
    with pytest.raises((ValueError, RuntimeError)) as error:  # some versions of torch turn one into the other
        op.run(arguments | {"logits": logits})
    text = f"{op.name}: logits must have at most 8 leading dimensions that do not merge, got 9"
    assert str(error.value).startswith(text)
    dense = op.run(arguments | {"logits": logits.contiguous()})
    assert all(dense[name].shape == logits.shape[:-1] for name in op.per_token)
