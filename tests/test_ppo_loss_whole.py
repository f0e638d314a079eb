"""ppo_loss_from_logits and ppo_loss_from_hidden with each option of ppo_loss."""

import math

import pytest
import torch
from cases import valid_arguments
from conftest import assert_same_bits, assert_within_torch_error
from linear_head import make_tiles_small, record_products
from ops import OF_HEAD, OPS

import ppo_ext
from ppo_ext.ops import ppo_loss_from_hidden, ppo_loss_from_logits, reference

WHOLE = [OPS[name] for name in ("ppo_loss_from_logits", "ppo_loss_from_hidden")]
MODES = WHOLE[0].modes
BY_SEQUENCE = [mode for mode in MODES.values() if mode.options.get("ratio_level", "token") != "token"]
WAYS = [
    pytest.param(OPS["ppo_loss_from_logits"], {}, id="logits"),
    pytest.param(OPS["ppo_loss_from_logits"], {"inplace_forward": True}, id="logits in place"),
    pytest.param(OPS["ppo_loss_from_hidden"], {}, id="hidden"),
]
each_way = pytest.mark.parametrize("op, way", WAYS)
each_op = pytest.mark.parametrize("op", WHOLE, ids=lambda op: op.name)
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


@pytest.fixture(params=(False, True), ids=("one chunk", "several chunks"))
def chunks(request, monkeypatch):
    if request.param:
        make_tiles_small(monkeypatch)
        monkeypatch.setattr(ppo_loss_from_logits, "_BLOCK", 500)  # bytes


def arguments(op, mode, shape=(3, 7), vocabulary=53, device="cpu", dtype=torch.float32):
    """Valid arguments with a bonus; old and reference log-probabilities are near the policy's."""
    given = valid_arguments(op, shape, vocabulary, device, dtype, mode)
    given["mask"] = torch.rand(shape, device=device) > 0.3
    given["mask"][::2] = True
    given.setdefault("entropy_coef", 0.2)
    given["old_logprobs"] = log_probabilities(op, given)[0] + 0.3 * torch.randn(shape, device=device)
    if "ref_logprobs" in given:
        given["ref_logprobs"] = given["old_logprobs"] + 0.3 * torch.randn(shape, device=device)
    return given


def log_probabilities(op, given):
    names = ("logits", "labels") if op.on_logits else ("hidden", "weight", "labels")
    below = ppo_ext.logprobs_and_entropy if op.on_logits else ppo_ext.linear_logprobs_and_entropy
    bias = {} if op.on_logits else {"bias": given["bias"]}
    return below(*(given[name] for name in names), mask=given["mask"], **bias)


class Composed:
    """The same from the two ops below."""

    @staticmethod
    def of(op):
        def loss(**given):
            logprobs, entropy = log_probabilities(op, given)
            of_head = ("logits", "hidden", "weight", "labels", "bias")
            rest = {name: x for name, x in given.items() if name not in of_head}
            return ppo_ext.ppo_loss(logprobs, entropy=entropy, **rest)

        return type("Composed", (), {op.name: staticmethod(loss)})


def run(op, given, grads=None, module=ppo_ext):
    """The results for copies of the tensors, which may be overwritten."""
    return op.run({name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()}, grads, module)


def doubles(given):
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in given.items()
    }


def close(results, expected, **tolerance):
    assert list(results) == list(expected)
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@each_mode
@each_way
def test_is_the_two_ops_below_it(op, way, mode, device, chunks):
    """In float64, where roundings that differ do not show."""
    given = arguments(op, mode, device=device, dtype=torch.float64)
    close(run(op, given | way), run(op, given, module=Composed.of(op)), rtol=1e-11, atol=1e-13)


@each_mode
@each_way
def test_matches_float64(op, way, mode, device, chunks):
    given, grads = arguments(op, mode, device=device), {"loss": torch.tensor(3.7, device=device)}
    ours, torchs = run(op, given | way, grads), run(op, given, grads, module=reference)
    exact = run(op, doubles(given), grads, module=reference)
    assert list(ours) == list(torchs)
    for name, result in ours.items():
        scale = max(1.0, exact[name].abs().max().item())
        assert_within_torch_error(name, result, torchs[name], exact[name], units=16, scale=scale)


@each_mode
@each_way
def test_masked_tokens_do_not_matter(op, way, mode, device, chunks):
    given = arguments(op, mode, device=device) | way
    masked, expected = ~given["mask"], run(op, given)
    for value in (math.nan, math.inf, -math.inf, 3e38):
        spoilt = {
            name: x.masked_fill(masked.view(masked.shape + (1,) * (x.dim() - 2)), value)
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape[:2] == masked.shape
            else x
            for name, x in given.items()
        }
        for name, result in run(op, spoilt).items():
            assert_same_bits(f"{name}, {value}", result, expected[name])
    for name, result in expected.items():
        if result.dim() and name.removeprefix("grad_") not in OF_HEAD:
            assert (result[masked] == 0).all(), name


@each_mode
@each_op
def test_gradcheck(op, mode, device, chunks):
    given = arguments(op, mode, (2, 3), 21, device, torch.float64)
    leaves = [name for name in op.differentiable if given.get(name) is not None]
    # those of a gradient that is by definition not the derivative of the value
    if {"cispo", "straight_through", "sequence_token"} & {x for x in mode.options.values() if isinstance(x, str)}:
        leaves = [name for name in leaves if name == "vpreds"]

    def loss(*tensors):
        return getattr(ppo_ext, op.name)(**given | dict(zip(leaves, tensors)))[0]

    assert not leaves or torch.autograd.gradcheck(loss, [given[name].requires_grad_() for name in leaves])


@each_mode
@each_op
def test_compiles_into_one_graph(op, mode, device):
    given = arguments(op, mode, device=device)
    torch.compiler.reset()
    compiled = torch.compile(getattr(ppo_ext, op.name), fullgraph=True, backend="aot_eager")
    expected = op.run(given)
    for name, result in op.run(given, module=type("Compiled", (), {op.name: staticmethod(compiled)})).items():
        assert_same_bits(name, result, expected[name])


@each_mode
def test_opcheck(mode, device, monkeypatch):
    """Of the operator as the op calls it."""
    calls, operator = [], ppo_loss_from_hidden._forward
    monkeypatch.setattr(ppo_loss_from_hidden, "_forward", lambda *given: calls.append(given) or operator(*given))
    op = OPS["ppo_loss_from_hidden"]
    op.run(arguments(op, mode, (2, 3), 17, device) | {"temperature": torch.rand(2, 3, device=device) + 0.5})
    assert len(calls) == 1
    torch.library.opcheck(operator, calls[0])


@each_mode
@each_way
def test_nothing_counts(op, way, mode, device):
    given = arguments(op, mode, device=device) | way
    given["mask"][:] = False
    for name, result in op.run(given).items():
        assert (result == 0).all(), name


@each_mode
@each_way
def test_the_ratio_guard_skips(op, way, mode, device, chunks):
    given = arguments(op, mode, device=device) | way | {"ratio_threshold": 0.01}
    given["advantages"][:] = math.inf
    results = op.run(given)
    assert results["policy/skipped"] == 1 and results["policy/ratio_mean"] > 0.01
    for name, result in results.items():
        if name.startswith(("loss", "grad_")):
            assert (result == 0).all(), name


@pytest.mark.parametrize("mode", BY_SEQUENCE, ids=str)
def test_ratios_of_sequences_take_one_product_more(mode, device, monkeypatch):
    op, products = OPS["ppo_loss_from_hidden"], record_products(monkeypatch)
    given = arguments(op, mode, (4, 5), 21, device)
    products.clear()
    op.run(given)
    assert len(products) == 4 and len(BY_SEQUENCE) == 2
    products.clear()
    ppo_ext.ppo_loss_from_hidden(
        **{name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    )
    assert len(products) == 1


@each_op
def test_an_error_has_the_name_of_the_op(op):
    given = valid_arguments(op)
    for options, kind, text in (
        ({"dual_clip": 3.0, "policy_loss": "cispo"}, ValueError, "dual_clip must be None with policy_loss='cispo'"),
        ({"kl_coef": 0.1}, ValueError, "kl_coef must be 0 with ref_logprobs=None"),
        ({"values": None}, TypeError, "values must be a torch.Tensor, got NoneType"),
        ({"denominator": 0}, ValueError, "denominator must be positive where the mask has tokens that count"),
    ):
        with pytest.raises(kind) as error:
            getattr(ppo_ext, op.name)(**given | {"mask": torch.ones(2, 3)} | options)
        assert str(error.value).startswith(f"{op.name}: {text}")
