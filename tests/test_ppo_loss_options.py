"""The options of ppo_loss: worked cases, of which each row is one option, and what must hold for all of them."""

import math

import pytest
import torch
from cases import FLOATS, valid_arguments
from conftest import assert_same_bits, assert_same_bits_for_any_threads, assert_within_torch_error
from ops import OPS

import ppo_ext
from ppo_ext.ops import _ppo_options_run, reference

NOT = 9e9  # a number under the mask
INPUTS = {
    "logprobs": [[-1.0, -0.5, -2.0], [-0.3, -1.2, -0.7]],
    "old_logprobs": [[-1.4, -0.4, -2.0], [-0.3, -2.7, -9.0]],
    "advantages": [[1, -2, 0.5], [-0.5, -1.5, 3]],
    "mask": [[1, 1, 1], [1, 1, 0]],
}
OF_SEQUENCE = {"advantages": [[1.0] * 3, [-0.5] * 3]}
REF = {"ref_logprobs": [[-1.1, -0.8, -1.5], [-0.5, -1.0, -3.0]]}
ROLLOUT = [[-1.2, -0.4, -1.2], [-0.9, -0.6, -5.0]]
ENTROPY = {"entropy": [[0.5, 0.6, 0.7], [0.8, 0.9, 0.1]]}
VALUES = {
    "vpreds": [[0.9, 0.2, -0.5], [0.3, 1.6, 5]],
    "values": [[0.5, 0.25, -0.1], [0.4, 1, 0]],
    "returns": [[1, 0, -0.6], [1, 1, 0]],
}
TIS = {"weights": [[0.818731, 1, 0.449329], [1.822119, 0.122456, 0]]}
MEAN, SUM = "seq_mean_token_mean", "seq_mean_token_sum"

# Options; the loss; the gradient of logprobs where it is known. Without a critic.
ROWS = (
    ({}, 1.466442, [[0, 0.361935, -0.1], [0.1, 1.344507, 0]]),
    ({"cliprange": (0.2, 0.28)}, 1.450442, None),
    ({"cliprange": (0.2, 0.28), "dual_clip": 3.0}, 1.005935, None),
    ({"dual_clip": 3.0}, 1.021935, [[0, 0.361935, -0.1], [0.1, 0, 0]]),
    ({"dual_clip": 2.0}, 0.721935, [[0, 0.361935, -0.1], [0.1, 0, 0]]),
    ({"policy_loss": "cispo"}, -0.202967, [[-0.24, 0.361935, -0.1], [0.1, 0.36, 0]]),
    ({"policy_loss": "cispo", "cliprange": (1.0, 0.2)}, -0.202967, [[-0.24, 0.361935, -0.1], [0.1, 0.36, 0]]),
    ({"policy_loss": "cispo", "cliprange": (1.0, 0.0)}, -0.170967, [[-0.2, 0.361935, -0.1], [0.1, 0.3, 0]]),
    ({"policy_loss": "reinforce"}, -0.19, [[-0.2, 0.4, -0.1], [0.1, 0.3, 0]]),
    # no clip
    ({"cliprange": 1e9, "aggregation": "token_sum"}, 7.040384, None),
    (
        {"ratio_level": "sequence_token", "aggregation": MEAN},
        1.150598,
        [[-0.184195, 0.36839, -0.092098], [0.264625, 0.793875, 0]],
    ),
    (
        {"ratio_level": "sequence", "aggregation": MEAN},
        1.150598,
        [[0.030699] * 3, [0.52925, 0.52925, 0]],
    ),
    ({"ratio_level": "sequence_token"}, 0.957317, None),
    (
        OF_SEQUENCE | {"ratio_level": "sequence", "aggregation": MEAN},
        -0.023335,
        [[-0.184195] * 3, [0.264625, 0.264625, 0]],
    ),
    (OF_SEQUENCE | {"ratio_level": "sequence", "aggregation": SUM}, -0.599256, None),
    ({"aggregation": SUM}, 3.666104, None),
    ({"dual_clip": 3.0, "aggregation": "token_sum"}, 5.109675, None),
    ({"dual_clip": 3.0, "aggregation": SUM}, 2.554837, None),
    ({"dual_clip": 3.0, "aggregation": MEAN}, 1.268279, None),
    ({"dual_clip": 3.0, "aggregation": "seq_mean_token_sum_norm"}, 0.851612, None),
    ({"aggregation": MEAN}, 1.823913, None),
    ({"aggregation": "seq_mean_token_sum_norm", "norm_length": 4}, 0.916526, None),
    ({"dual_clip": 3.0, "denominator": 20, "scale": 2.0}, 0.510967, None),
    ({"dual_clip": 3.0, "denominator": 8, "scale": 2.0, "aggregation": MEAN}, 0.634140, None),
    ({"denominator": 20, "scale": 2.0}, 0.733221, None),
    ({"denominator": torch.tensor(20)}, 0.366610, None),
    (REF | {"kl_coef": 0.1, "kl_estimator": "k3"}, 1.471132, None),
    (REF | {"kl_coef": 0.1, "kl_estimator": "k3", "kl_gradient": "weighted"}, 1.472592, None),
    (
        REF | {"kl_coef": 0.1, "kl_estimator": "k3", "kl_gradient": "straight_through"},
        1.471132,
        [[0.002, 0.367935, -0.11], [0.104, 1.340507, 0]],
    ),
    (REF | {"kl_coef": 0.1, "kl_estimator": "k1"}, 1.464442, None),
    (ENTROPY | {"entropy_coef": 0.1}, 1.396442, None),
    (TIS | {"dual_clip": 3.0}, 0.412929, None),
    (TIS, 0.467362, None),
)


def run(inputs, op=ppo_ext.ppo_loss, dtype=torch.float64, device="cpu", **options):
    """The loss, the statistics and the gradients of what is differentiable and given."""
    given = INPUTS | dict.fromkeys(("vpreds", "values", "returns")) | inputs
    given = {
        name: torch.tensor(x, dtype=dtype, device=device) if isinstance(x, list) else x for name, x in given.items()
    }
    leaves = {
        name: given[name].requires_grad_() for name in ("logprobs", "vpreds", "entropy") if given.get(name) is not None
    }
    loss, stats = op(**given, **options)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **stats, **{f"grad_{name}": grad for name, grad in zip(leaves, grads)}}


@pytest.mark.parametrize("op", (ppo_ext.ppo_loss, reference.ppo_loss), ids=("op", "reference"))
@pytest.mark.parametrize("options, loss, grad", ROWS)
def test_worked_cases(op, options, loss, grad, device):
    result = run(options, op, device=device)
    assert result["loss"].item() == pytest.approx(loss, abs=1.1e-6)
    if grad:
        expected = torch.tensor(grad, dtype=torch.float64, device=device)
        torch.testing.assert_close(result["grad_logprobs"], expected, rtol=0, atol=1.1e-6)


@pytest.mark.parametrize("op", (ppo_ext.ppo_loss, reference.ppo_loss), ids=("op", "reference"))
@pytest.mark.parametrize(
    "estimator, gradient, kl, grad",
    (
        ("k1", "exact", [0.1, 0.3, -0.5, 0.2, -0.2], [1, 1, 1, 1, 1]),
        ("k2", "exact", [0.005, 0.045, 0.125, 0.02, 0.02], [0.1, 0.3, -0.5, 0.2, -0.2]),
        (
            "k3",
            "exact",
            [0.004837, 0.040818, 0.148721, 0.018731, 0.021403],
            [0.095163, 0.259182, -0.648721, 0.181269, -0.221403],
        ),
        ("abs", "exact", [0.1, 0.3, 0.5, 0.2, 0.2], [1, 1, -1, 1, -1]),
        ("k1", "straight_through", [0.1, 0.3, -0.5, 0.2, -0.2], [0.1, 0.3, -0.5, 0.2, -0.2]),
        (
            "k3",
            "straight_through",
            [0.004837, 0.040818, 0.148721, 0.018731, 0.021403],
            [0.1, 0.3, -0.5, 0.2, -0.2],
        ),
        (
            "k3",
            "weighted",
            [0.007217, 0.036934, 0.148721, 0.018731, 0.09592],
            [0.149183, 0.271451, -0.5, 0.2, -0.896338],
        ),
    ),
)
def test_kl_estimators(op, estimator, gradient, kl, grad, device):
    """The KL term alone: advantages of 0, a sum and not a mean."""
    options = REF | {"advantages": [[0.0] * 3] * 2, "kl_coef": 1.0, "aggregation": "token_sum"}
    options |= {"kl_estimator": estimator, "kl_gradient": gradient}
    result = run(options, op, device=device)
    assert result["loss"].item() == pytest.approx(sum(kl), abs=5e-6)
    assert result["policy/ref_kl"].item() == pytest.approx(sum(kl) / 5, abs=1e-6)
    assert result["grad_logprobs"].flatten().tolist() == pytest.approx([*grad, 0], abs=1.1e-6)


@pytest.mark.parametrize("op", (ppo_ext.ppo_loss, reference.ppo_loss), ids=("op", "reference"))
@pytest.mark.parametrize(
    "options, loss, grad",
    (
        ({}, 0.107, [0, 0.04, 0, -0.14, 0.12, 0]),
        ({"aggregation": MEAN}, 0.124583, None),
        ({"cliprange_value": None}, 0.091, [-0.02, 0.04, 0.02, -0.14, 0.12, 0]),
        ({"value_loss": "huber"}, 0.107, [0, 0.04, 0, -0.14, 0.12, 0]),
    ),
)
def test_value_losses(op, options, loss, grad, device):
    result = run(VALUES | {"advantages": [[0.0] * 3] * 2, "vf_coef": 1.0} | options, op, device=device)
    assert result["loss"].item() == pytest.approx(loss, abs=1e-6)
    if grad:
        assert result["grad_vpreds"].flatten().tolist() == pytest.approx(grad, abs=1e-6)


@pytest.mark.parametrize("op", (ppo_ext.ppo_loss, reference.ppo_loss), ids=("op", "reference"))
def test_huber_beyond_its_bound(op, device):
    values = {"vpreds": [[20.0, -20.0, 1.0], [0.0] * 3], "values": [[0.0] * 3] * 2, "returns": [[0.0] * 3] * 2}
    options = {"value_loss": "huber", "cliprange_value": None, "vf_coef": 1.0, "aggregation": "token_sum"}
    result = run(values | {"advantages": [[0.0] * 3] * 2} | options, op, device=device)
    assert result["loss"].item() == pytest.approx(150 + 150 + 0.5)
    assert result["grad_vpreds"].flatten().tolist() == pytest.approx([10, -10, 1, 0, 0, 0])


@pytest.mark.parametrize(
    "options, text",
    (
        (
            {"dual_clip": 3.0, "policy_loss": "cispo"},
            "dual_clip must be None with policy_loss='cispo', got 3.0",
        ),
        (
            {"ratio_level": "sequence", "policy_loss": "reinforce"},
            "ratio_level must be 'token' with policy_loss='reinforce', got 'sequence'",
        ),
        ({"kl_coef": 0.1}, "kl_coef must be 0 with ref_logprobs=None, got 0.1"),
        ({"entropy_coef": 0.1}, "entropy_coef must be 0 with entropy=None, got 0.1"),
        ({"norm_length": 4}, "norm_length must be None with aggregation='token_mean', got 4.0"),
        (
            {"denominator": 4, "aggregation": "token_sum"},
            "denominator must be None with aggregation='token_sum', got one",
        ),
        (
            {"row_counts": torch.ones(2)},
            "row_counts must be None with aggregation='token_mean', got a tensor",
        ),
        (
            {"row_counts": torch.ones(2), "aggregation": MEAN, "ratio_level": "sequence"},
            "row_counts must be None with ratio_level='sequence', got a tensor",
        ),
        ({"denominator": 0}, "denominator must be positive where the mask has tokens that count, got 0.0"),
        ({"cliprange": (0.1, 0.2, 0.3)}, "cliprange must be a number or a pair (low, high), got 3 numbers"),
    ),
)
def test_refuses_what_means_nothing(options, text):
    with pytest.raises(ValueError) as error:
        run(options)
    assert str(error.value) == f"ppo_loss: {text}"


def test_nothing_counts(device):
    result = run(VALUES | REF | ENTROPY | {"mask": [[0] * 3] * 2, "kl_coef": 0.1, "entropy_coef": 0.1}, device=device)
    assert all((x == 0).all() for x in result.values())
    assert run({"mask": [[0] * 3] * 2, "denominator": 0}, device=device)["loss"] == 0


def test_a_denominator_on_the_device_that_is_not_positive_shows(device):
    assert math.isnan(run({"denominator": torch.zeros((), device=device)}, device=device)["loss"])


# ---- every mode -----------------------------------------------------------------------------------------------------

OP = OPS["ppo_loss"]
each_mode = pytest.mark.parametrize("mode", OP.modes.values(), ids=list(OP.modes))


def arguments(mode, shape, device, dtype=torch.float32):
    """Valid arguments; in every second row all tokens count."""
    given = valid_arguments(OP, shape, device=device, dtype=dtype, mode=mode)
    given["mask"] = torch.rand(shape, device=device) > 0.3
    given["mask"][::2] = True
    return given


def doubles(given):
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in given.items()
    }


@pytest.mark.parametrize("shape", ((5, 33), (2, 1025), (300, 7), (1, 1)), ids=str)
@each_mode
def test_matches_float64(mode, shape, device):
    given, grads = arguments(mode, shape, device), {"loss": torch.tensor(3.7, device=device)}
    ours, torchs = OP.run(given, grads), OP.run(given, grads, reference)
    exact = OP.run(doubles(given), grads, reference)
    assert list(ours) == list(torchs)
    for name, result in ours.items():
        assert result.dtype == torch.float32 and not result.requires_grad
        scale = 0.0 if result.dim() else max(1.0, exact[name].abs().item())
        assert_within_torch_error(name, result, torchs[name], exact[name], units=4, scale=scale)


@each_mode
def test_masked_tokens_do_not_matter(mode, device):
    given = arguments(mode, (5, 70), device)
    masked, expected = ~given["mask"], OP.run(given)
    for value in (math.nan, math.inf, -math.inf, 3e38):
        spoilt = {
            name: x.masked_fill(masked, value)
            if isinstance(x, torch.Tensor) and x.shape == masked.shape and x.is_floating_point()
            else x
            for name, x in given.items()
        }
        for name, result in OP.run(spoilt).items():
            assert_same_bits(f"{name}, {value}", result, expected[name])
    for name, result in expected.items():
        assert result.dim() == 0 or (result[masked] == 0).all(), name


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=str)
@each_mode
def test_no_tokens(mode, shape, device):
    """Every statistic of nothing is 0, those of the options too."""
    given = valid_arguments(OP, shape, device=device, dtype=torch.float32, mode=mode)
    if mode.options.get("aggregation") == "seq_mean_token_sum_norm":
        given["norm_length"] = 4.0
    for name, result in OP.run(given).items():
        assert (result == 0).all(), name


@each_mode
def test_gradcheck(mode, device):
    given = arguments(mode, (3, 5), device, torch.float64)
    leaves = [name for name in ("logprobs", "vpreds", "entropy") if isinstance(given.get(name), torch.Tensor)]
    if mode.options.get("kl_gradient") == "straight_through" or mode.options.get("policy_loss") == "cispo":
        given["ref_logprobs"] = given["logprobs"] - 1.0 if "ref_logprobs" in given else None
        leaves.remove("logprobs")  # its gradient is by definition not the derivative of the value
    if not leaves:
        return
    if mode.options.get("ratio_level") == "sequence_token":
        leaves.remove("logprobs")

    def loss(*tensors):
        return ppo_ext.ppo_loss(**given | dict(zip(leaves, tensors)))[0]

    assert torch.autograd.gradcheck(loss, [given[name].requires_grad_() for name in leaves])


@each_mode
def test_compiles_into_one_graph(mode, device):
    given = arguments(mode, (4, 9), device)
    torch.compiler.reset()
    compiled = torch.compile(ppo_ext.ppo_loss, fullgraph=True, backend="aot_eager")
    expected = OP.run(given)
    for name, result in OP.run(given, module=type("Compiled", (), {"ppo_loss": staticmethod(compiled)})).items():
        assert_same_bits(name, result, expected[name])


@each_mode
def test_opcheck(mode, device, monkeypatch):
    """Of the operators as the op calls them, without autograd."""
    calls = []
    for name in ("_forward", "_backward"):
        operator = getattr(_ppo_options_run, name)

        def record(*arguments, operator=operator):
            calls.append((operator, arguments))
            return operator(*arguments)

        monkeypatch.setattr(_ppo_options_run, name, record)
    OP.run(arguments(mode, (4, 9), device))
    assert len(calls) == 2
    for operator, given in calls:
        torch.library.opcheck(operator, [x.detach() if isinstance(x, torch.Tensor) else x for x in given])


@each_mode
def test_same_bits_for_any_threads(mode, device):
    given = arguments(mode, (64, 1100), device)
    assert_same_bits_for_any_threads(lambda: OP.run(given))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_mode
def test_dtypes(mode, dtype, device):
    given = arguments(mode, (6, 33), device, dtype)
    results = OP.run(given)
    assert results["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert results["grad_logprobs"].dtype == dtype
    single = {
        name: x.float() if isinstance(x, torch.Tensor) and x.dtype != torch.float64 else x for name, x in given.items()
    }
    expected = OP.run(single | {"mask": given["mask"]})
    for name, result in results.items():
        assert_same_bits(name, result, expected[name].to(result.dtype))


def test_no_second_derivative(device):
    given = arguments(OP.modes["bounds"], (2, 3), device)
    weight = torch.ones((), device=device, requires_grad=True)
    given["logprobs"].requires_grad_()
    with pytest.raises(RuntimeError, match="ppo_loss: .* differentiable once"):
        torch.autograd.grad(weight * ppo_ext.ppo_loss(**given)[0], given["logprobs"], create_graph=True)


def test_a_rejected_token_has_no_gradient_even_if_its_ratio_is_infinite(device):
    inputs = {"weights": [[0.0, 1, 1], [1, 1, 1]], "logprobs": [[900.0, -0.5, -2.0], [-0.3, -1.2, -0.7]]}
    result = run(inputs | {"advantages": [[-1.0] * 3] * 2}, device=device)
    assert result["loss"].isfinite() and (result["grad_logprobs"][0, 0] == 0) and result["policy/ratio_max"] == math.inf
    assert result["policy/weights_zero"].item() == pytest.approx(0.2)


def test_statistics_of_the_options(device):
    result = run(REF | {"cliprange": (0.2, 0.28), "dual_clip": 3.0}, device=device)
    ratios = [math.exp(0.4), math.exp(-0.1), 1.0, 1.0, math.exp(1.5)]
    expected = {
        "policy/clipfrac": 0.2,
        "policy/clipfrac_low": 0.0,
        "policy/clipfrac_high": 0.2,
        "policy/clipfrac_dual": 0.2,
        "policy/ratio_max": max(ratios),
        "policy/ratio_min": min(ratios),
        "policy/approxkl_k3": sum(r - 1 - math.log(r) for r in ratios) / 5,
        "policy/ref_kl": (0.1 + 0.3 - 0.5 + 0.2 - 0.2) / 5,
    }
    assert {name: result[name].item() for name in expected} == pytest.approx(expected, abs=1e-9)
    assert not any(name.startswith(("val/", "returns/", "loss/value")) for name in result)
