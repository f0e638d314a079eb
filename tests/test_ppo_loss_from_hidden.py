"""ppo_loss_from_hidden against float64 and against linear_logprobs_and_entropy and ppo_loss, and its chunks."""

import math

import pytest
import torch
from cases import FLOATS, token_inputs
from conftest import assert_same_bits, assert_within_torch_error
from linear_head import make_tiles_small, record_products

import ppo_ext
from ppo_ext.ops import _linear_gradients, _linear_head, _pages, _ppo_tokens, reference

LEAVES = ("hidden", "weight", "bias", "vpreds")
OPTIONS = {
    "plain": {},
    "with a bonus": {"entropy_coef": 0.3, "temperature": 0.7},
    "scaled and capped": {"entropy_coef": -0.2, "logit_scale": 1.5, "softcap": 2.0},
}


def inputs_of(shape=(3, 7), V=203, H=8, dtype=torch.float32, device="cpu"):
    """The op's tensors; old_logprobs are near the log-probabilities, so that some ratios are clipped and some not."""
    tokens = token_inputs(shape, device)
    found = {name: tokens[name] for name in ("advantages", "vpreds", "values", "returns")}
    found["hidden"] = torch.randn(*shape, H, device=device).to(dtype)
    found["weight"] = (torch.randn(V, H, device=device) / H**0.5).to(dtype)
    found["bias"] = torch.randn(V, device=device).to(dtype)
    found["labels"] = torch.randint(V, shape, device=device)
    found["mask"] = torch.rand(shape, device=device) > 0.3
    logprobs = ppo_ext.linear_logprobs(**{name: found[name] for name in ("hidden", "weight", "labels", "bias")})
    found["old_logprobs"] = logprobs.float() + 0.3 * torch.randn(shape, device=device)
    return found


def run(inputs, op=ppo_ext.ppo_loss_from_hidden, leaves=LEAVES, dtype=None, factor=1.0, **options):
    """Loss, statistics and, as grad_<name>, the gradients of the loss times a factor."""
    tensors = {name: x.to(dtype) if dtype and x.is_floating_point() else x.clone() for name, x in inputs.items()}
    for name in leaves:
        tensors[name].requires_grad_()
    loss, stats = op(**tensors, **options)
    grads = torch.autograd.grad(factor * loss, [tensors[name] for name in leaves]) if leaves else ()
    return {"loss": loss.detach()} | stats | {f"grad_{name}": grad for name, grad in zip(leaves, grads)}


def composed(hidden, weight, labels, *tokens_by_position, **named):
    """The same from the two ops below it."""
    options = {name: named.pop(name) for name in ("bias", "temperature", "logit_scale", "softcap") if name in named}
    logprobs, entropy = ppo_ext.linear_logprobs_and_entropy(hidden, weight, labels, mask=named["mask"], **options)
    return ppo_ext.ppo_loss(logprobs, *tokens_by_position, entropy=entropy, **named)


@pytest.fixture
def small_chunks(monkeypatch):
    make_tiles_small(monkeypatch)


@pytest.fixture
def products(monkeypatch):
    return record_products(monkeypatch)


# ---- the numbers ----------------------------------------------------------------------------------------------------


def check_against_float64(inputs, dtype, options):
    single = torch.float64 if dtype == torch.float64 else torch.float32
    ours = run(inputs, **options)
    torchs, exact = (run(inputs, reference.ppo_loss_from_hidden, dtype=to, **options) for to in (single, torch.float64))
    assert list(ours) == list(torchs)
    for name, result in ours.items():
        rounded = torchs[name].to(result.dtype)  # a gradient of half precision is rounded once
        assert_within_torch_error(name, result, rounded, exact[name], units=8, scale=4.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_float64(device, dtype, options):
    check_against_float64(inputs_of(dtype=dtype, device=device), dtype, options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_and_tiles_add_up(device, dtype, options, small_chunks):
    check_against_float64(inputs_of(dtype=dtype, device=device), dtype, options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_is_the_two_ops_below_it(device, options):
    inputs = inputs_of(device=device)
    ours, expected = run(inputs, **options), run(inputs, composed, **options)
    for name, result in ours.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert_same_bits("loss/total", ours["loss/total"], ours["loss"])
    assert 0 < ours["policy/clipfrac"] < 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_float64(device, options, small_chunks):
    inputs = {
        name: x.double().requires_grad_(name in LEAVES) if x.is_floating_point() else x
        for name, x in inputs_of((2, 3), 21, 4, device=device).items()
    }

    def loss(*leaves):
        return ppo_ext.ppo_loss_from_hidden(**inputs | dict(zip(LEAVES, leaves)), **options)[0]

    assert torch.autograd.gradcheck(loss, [inputs[name] for name in LEAVES])


def test_a_bonus_lowers_the_loss(device):
    inputs = inputs_of(device=device)
    without, bonus = run(inputs), run(inputs, entropy_coef=0.5)
    torch.testing.assert_close(bonus["loss"], without["loss"] - 0.5 * without["policy/entropy"])


@pytest.mark.parametrize("entropy_coef", (0.0, 0.1))
def test_the_ratio_guard_skips_what_is_done_already(device, entropy_coef):
    inputs = inputs_of(device=device)
    inputs["advantages"][:] = math.inf  # and so the gradients would be infinite
    results = run(inputs, ratio_threshold=0.01, entropy_coef=entropy_coef)
    assert results["policy/skipped"] == 1
    for name in ("loss", "loss/total", *(f"grad_{leaf}" for leaf in LEAVES)):
        assert (results[name] == 0).all(), name


def test_nothing_counts(device):
    inputs = inputs_of(device=device)
    inputs["mask"][:] = False
    inputs["hidden"][:] = math.nan
    for name, result in run(inputs, entropy_coef=0.1).items():
        assert (result == 0).all(), name


# ---- products and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", (LEAVES, ("hidden",), ("weight", "vpreds"), ("vpreds",), ()), ids=str)
def test_three_products_at_most_of_the_rows_that_count(device, leaves, products):
    inputs = inputs_of((4, 5), 21, 4, device=device)
    expected = run(inputs)
    n = int(inputs["mask"].sum())
    products.clear()
    results = run(inputs, leaves=leaves)
    wanted = [((n, 4), (4, 21))]
    wanted += [((n, 21), (21, 4))] * ("hidden" in leaves) + [((21, n), (n, 4))] * ("weight" in leaves)
    assert sorted(products) == sorted(wanted) and 0 < n < 20
    for name, result in results.items():
        assert_same_bits(name, result, expected[name])


@pytest.mark.parametrize("rows", (1, 255, 256, 257, 1000, 1024, 8192))
def test_a_chunk_is_of_256_rows_at_most(rows):
    chunk_rows, columns = _linear_head.chunk_sizes(rows, 50257, "cpu")
    assert rows / -(-rows // 256) <= chunk_rows <= 256 and columns % 16 == 0 and chunk_rows * columns <= 1 << 20


def test_no_other_memory_of_the_size_of_the_logits(device, monkeypatch):
    """The largest tensors that are made: one chunk of logits and the gradients."""
    made, new_empty = [], _pages.new_empty

    def recorded(like, *shape, dtype):
        made.append(shape)
        return new_empty(like, *shape, dtype=dtype)

    for module in (_linear_gradients, _linear_head):
        monkeypatch.setattr(module, "new_empty", recorded)
    monkeypatch.setitem(_linear_head._CHUNK_ROWS, device, 16)
    inputs = inputs_of((10, 10), 300, 4, device=device)
    inputs["mask"][:] = True
    made.clear()
    run(inputs)
    assert sorted(made) == [(15, 300), (300, 4)]


# ---- the backward pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", (2.0, -0.5))
def test_the_gradient_of_the_loss_multiplies(device, factor):
    inputs = inputs_of(device=device)
    once, more = run(inputs, entropy_coef=0.1), run(inputs, entropy_coef=0.1, factor=factor)
    for leaf in LEAVES:
        assert_same_bits(leaf, more[f"grad_{leaf}"], factor * once[f"grad_{leaf}"])


def test_an_infinite_gradient_of_the_loss_stays_out_of_masked_rows(device):
    inputs = inputs_of(device=device)
    for factor in (math.inf, math.nan):
        results = run(inputs, factor=factor)
        for name in ("grad_hidden", "grad_vpreds"):
            assert (results[name][~inputs["mask"]] == 0).all() and not results[name].isfinite().all()


def test_a_graph_that_is_kept_gives_the_same_again(device):
    inputs = inputs_of(device=device)
    leaves = [inputs[name].requires_grad_() for name in LEAVES]
    loss, _ = ppo_ext.ppo_loss_from_hidden(**inputs)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    for factor in (2.0, 1.0):
        found = torch.autograd.grad(factor * loss, leaves, retain_graph=factor != 1.0)
        for leaf, grad, once in zip(LEAVES, found, expected):
            assert_same_bits(leaf, grad, factor * once)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_a_graph_that_is_freed_gives_its_gradients_away(monkeypatch):
    made, product = [], _ppo_tokens.product
    monkeypatch.setattr(_ppo_tokens, "product", lambda grad, factor: made.append(grad.shape) or product(grad, factor))
    inputs = inputs_of()
    run(inputs)
    assert made == []
    run(inputs, factor=0.5)
    assert len(made) == len(LEAVES)


def test_differentiable_once():
    inputs = inputs_of()
    inputs["hidden"].requires_grad_()
    loss, stats = ppo_ext.ppo_loss_from_hidden(**inputs)
    assert not any(x.requires_grad for x in stats.values())
    factor = torch.ones((), requires_grad=True)
    (grad,) = torch.autograd.grad(factor * loss, inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- torch ----------------------------------------------------------------------------------------------------------


def test_compiles_into_one_graph(device):
    inputs = inputs_of(device=device)
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = [inputs[name].clone().requires_grad_() for name in LEAVES]
        op = wrap(lambda *xs: ppo_ext.ppo_loss_from_hidden(**inputs | dict(zip(LEAVES, xs)), entropy_coef=0.1)[0])
        results.append(torch.autograd.grad(2 * op(*leaves), leaves))
    for leaf, eager, compiled in zip(LEAVES, *results):
        assert_same_bits(leaf, compiled, eager)


def test_same_bits_on_every_run(device):
    inputs = inputs_of((16, 40), 3001, 32, device=device)
    first, second = run(inputs, entropy_coef=0.1), run(inputs, entropy_coef=0.1)
    for name, result in first.items():
        assert_same_bits(name, result, second[name])


def test_rows_of_zeros_while_a_graph_is_captured(device, monkeypatch):
    inputs = inputs_of(device=device)
    expected = run(inputs, entropy_coef=0.1)
    monkeypatch.setattr(_linear_head, "capturing", lambda x: True)
    inputs["hidden"][~inputs["mask"]] = math.nan
    for name, result in run(inputs, entropy_coef=0.1).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_text_of_an_error_of_the_head(device):
    inputs = inputs_of()
    inputs["mask"][:] = True
    inputs["labels"][1, 2] = -100
    text = r"labels\[1, 2\] must be an id in \[0, 203\), got -100; leave rows without a label out by the mask$"
    for validate in (False, True):
        with pytest.raises(ValueError, match=rf"^ppo_loss_from_hidden: {text}"):
            ppo_ext.ppo_loss_from_hidden(**inputs, validate=validate)
