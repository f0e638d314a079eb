"""ppo_loss_from_logits against float64 and against logprobs_and_entropy and ppo_loss, and its gradients in place."""

import math

import pytest
import torch
from cases import FLOATS, logits_inputs, token_inputs
from conftest import assert_same_bits, assert_within_torch_error

import ppo_ext
from ppo_ext.ops import ppo_loss_from_logits, reference

TOKENS = ("advantages", "vpreds", "values", "returns")
LEAVES = ("logits", "vpreds")
OPTIONS = {"plain": {}, "with a bonus": {"entropy_coef": 0.3, "temperature": 0.7}}
WAYS = {
    "new memory": {},
    "backward in place": {"inplace_backward": True},
    "forward in place": {"inplace_forward": True},
    "both": {"inplace_forward": True, "inplace_backward": True},
}


def inputs_of(shape=(4, 9), V=101, dtype=torch.float32, device="cpu"):
    of_logits = logits_inputs((*shape, V), dtype, device)
    tokens = token_inputs(shape, device)
    found = {name: of_logits[name] for name in ("logits", "labels", "mask")} | {name: tokens[name] for name in TOKENS}
    logprobs = reference.logprobs(found["logits"].double(), found["labels"]).float()
    return found | {"old_logprobs": logprobs + 0.3 * torch.randn(shape, device=device)}


def run(inputs, op=ppo_ext.ppo_loss_from_logits, dtype=None, factor=1.0, **options):
    """Loss, statistics and the gradients of the loss times a factor. The op gets a view of a copy of the logits."""
    tensors = {name: x.to(dtype) if dtype and x.is_floating_point() else x.clone() for name, x in inputs.items()}
    leaves = [tensors[name].requires_grad_() for name in LEAVES]
    loss, stats = op(**tensors | {"logits": leaves[0].view_as(leaves[0])}, **options)
    grads = torch.autograd.grad(factor * loss, leaves)
    return {"loss": loss.detach()} | stats | dict(zip(("grad_logits", "grad_vpreds"), grads))


def composed(logits, labels, mask, temperature=1.0, **named):
    logprobs, entropy = ppo_ext.logprobs_and_entropy(logits, labels, mask=mask, temperature=temperature)
    return ppo_ext.ppo_loss(logprobs, mask=mask, entropy=entropy, **named)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(ppo_loss_from_logits, "_BLOCK", 2000)  # bytes: rows of 101 logits come in fours at most


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_float64(device, dtype, way, options, small_blocks):
    inputs = inputs_of(dtype=dtype, device=device)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    ours = run(inputs, **options, **way)
    torchs, exact = (run(inputs, reference.ppo_loss_from_logits, dtype=to, **options) for to in (single, torch.float64))
    assert list(ours) == list(torchs)
    for name, result in ours.items():
        rounded = torchs[name].to(result.dtype)
        assert_within_torch_error(name, result, rounded, exact[name], units=8, scale=4.0 * ("grad" not in name))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_has_the_bits_of_the_two_ops_below_it(device, dtype, way, small_blocks):
    inputs = inputs_of(dtype=dtype, device=device)
    inputs |= {name: inputs[name].to(dtype) for name in (*TOKENS, "old_logprobs")}
    ours, expected = run(inputs, **way), run(inputs, composed)
    assert 0 < ours["policy/clipfrac"] < 1
    for name, result in ours.items():
        if name == "grad_logits" and way.get("inplace_forward"):  # one over the count is another factor there
            torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-8)
        else:
            assert_same_bits(name, result, expected[name])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_without_options_it_has_the_bits_of_ppo_loss_without_options(device, way, small_blocks):
    def plain(logits, labels, mask, **named):
        return ppo_ext.ppo_loss(ppo_ext.logprobs(logits, labels, mask=mask), mask=mask, **named)

    inputs = inputs_of(device=device)
    ours, expected = run(inputs, **way), run(inputs, plain)
    for name, result in expected.items():
        if name != "grad_logits":  # that of the entropy, which is 0, is added
            assert_same_bits(name, ours[name], result)
    torch.testing.assert_close(ours["grad_logits"], expected["grad_logits"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_float64(device, options):
    inputs = {
        name: x.double() if x.is_floating_point() else x for name, x in inputs_of((2, 3), 5, device=device).items()
    }
    leaves = [inputs[name].requires_grad_() for name in LEAVES]

    def loss(logits, vpreds):
        return ppo_ext.ppo_loss_from_logits(**inputs | {"logits": logits, "vpreds": vpreds}, **options)[0]

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("entropy_coef", (0.0, 0.1))
def test_the_ratio_guard_skips(device, way, entropy_coef, small_blocks):
    inputs = inputs_of(device=device)
    inputs["advantages"][:] = math.inf
    results = run(inputs, ratio_threshold=0.01, entropy_coef=entropy_coef, **way)
    assert results["policy/skipped"] == 1
    for name in ("loss", "loss/total", "grad_logits", "grad_vpreds"):
        assert (results[name] == 0).all(), name


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nothing_counts(device, way):
    inputs = inputs_of(device=device)
    inputs["mask"][:] = False
    inputs["logits"][:] = math.nan
    for name, result in run(inputs, entropy_coef=0.1, **way).items():
        assert (result == 0).all(), name


# ---- gradients in place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", (2.0, -0.5, math.inf))
def test_the_gradient_of_the_loss_multiplies(device, factor):
    inputs = inputs_of(device=device)
    expected = run(inputs, factor=factor)
    results = run(inputs, factor=factor, inplace_forward=True)
    assert (results["grad_logits"][~inputs["mask"]] == 0).all()
    if math.isfinite(factor):
        torch.testing.assert_close(results["grad_logits"], expected["grad_logits"], rtol=1e-5, atol=1e-8)
        assert_same_bits("vpreds", results["grad_vpreds"], expected["grad_vpreds"])


def test_the_gradient_is_in_the_memory_of_the_logits(device):
    inputs = inputs_of(device=device)
    expected = run(inputs)["grad_logits"]
    leaf = inputs["logits"].clone().requires_grad_()
    logits = leaf * 1.0
    loss, _ = ppo_ext.ppo_loss_from_logits(**inputs | {"logits": logits}, inplace_forward=True)
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-5, atol=1e-8)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.data_ptr() == logits.data_ptr()


def test_a_graph_that_is_kept_gives_the_same_again(device):
    inputs = inputs_of(device=device)
    leaf = inputs["logits"].clone().requires_grad_()
    loss, _ = ppo_ext.ppo_loss_from_logits(**inputs | {"logits": leaf * 1.0}, inplace_forward=True)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    expected = first.clone()
    first.zero_()
    assert_same_bits("gradient", torch.autograd.grad(2 * loss, leaf)[0], 2 * expected)


@pytest.mark.parametrize("way", ("inplace_forward", "inplace_backward"))
def test_overwritten_logits_that_are_used_later_are_an_error(device, way):
    inputs = inputs_of(device=device)
    leaf = inputs["logits"].clone().requires_grad_()
    logits = leaf.exp()  # whose gradient needs its result
    loss, _ = ppo_ext.ppo_loss_from_logits(**inputs | {"logits": logits}, **{way: True})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rows", ("a view of more tokens", "tokens first", "expanded"))
def test_strided_logits_in_place(device, rows, small_blocks):
    inputs = inputs_of(device=device)
    if rows == "expanded":
        inputs["logits"] = inputs["logits"][:1, :1].clone()
    expected = run(inputs | {"logits": inputs["logits"].expand(4, 9, -1).clone()})["grad_logits"]
    leaf = inputs["logits"].clone().requires_grad_()
    logits = {
        "a view of more tokens": lambda: torch.cat([leaf, leaf], 1)[:, :9],
        "tokens first": lambda: (leaf.transpose(0, 1) * 1.0).transpose(0, 1),
        "expanded": lambda: (leaf * 1.0).expand(4, 9, -1),
    }[rows]()
    loss, _ = ppo_ext.ppo_loss_from_logits(**inputs | {"logits": logits}, inplace_forward=True)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-8)


def test_logits_without_a_gradient_stay(device):
    inputs = inputs_of(device=device)
    inputs["vpreds"].requires_grad_()
    before = inputs["logits"].clone()
    ppo_ext.ppo_loss_from_logits(**inputs, inplace_forward=True)[0].backward()
    assert_same_bits("logits", inputs["logits"], before)
    with torch.no_grad():
        inputs["logits"].requires_grad_()
        ppo_ext.ppo_loss_from_logits(**inputs, inplace_forward=True)
    assert_same_bits("logits", inputs["logits"].detach(), before)


def test_compiles_into_one_graph(device):
    inputs = inputs_of(device=device)
    results = []
    for compiled in (False, True):
        leaves = [inputs[name].clone().requires_grad_() for name in LEAVES]

        def loss(*xs, compiled=compiled):
            options = {"entropy_coef": 0.1, "inplace_forward": compiled}  # without effect there
            return ppo_ext.ppo_loss_from_logits(**inputs | dict(zip(LEAVES, xs)), **options)[0]

        op = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        results.append(torch.autograd.grad(2 * op(*leaves), leaves))
    for leaf, eager, compiled in zip(LEAVES, *results):
        assert_same_bits(leaf, compiled, eager)
