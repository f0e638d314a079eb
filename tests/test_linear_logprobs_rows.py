"""linear_logprobs and its kin: rows that do not count, what a head may hold, and what torch asks of an operator."""

import math

import pytest
import torch
from conftest import assert_same_bits
from linear_head import head_inputs, make_tiles_small, record_products, run

import ppo_ext
from ppo_ext.ops import _linear_head, _linear_tiles, check_labels, reference

INF = math.inf


@pytest.fixture
def small_tiles(monkeypatch):
    make_tiles_small(monkeypatch)


@pytest.fixture
def products(monkeypatch):
    return record_products(monkeypatch)


# ---- rows that do not count -----------------------------------------------------------------------------------------


def test_rows_that_do_not_count_are_left_out_of_the_products(device, products):
    inputs = head_inputs((4, 5), 21, 4, torch.float32, device)
    run(inputs)
    count = int(inputs["mask"].sum())
    assert 0 < count < 20 and {max(a[0], a[1]) if a[0] == 21 else a[0] for a, _ in products} == {count, 21}


def spoilt(inputs, value, label):
    hidden = inputs["mask"].logical_not()
    return inputs | {
        "hidden": inputs["hidden"].masked_fill(hidden[..., None], value),
        "labels": inputs["labels"].masked_fill(hidden, label),
        "grad_logprobs": inputs["grad_logprobs"].masked_fill(hidden, value),
    }


@pytest.mark.parametrize("capturing", (False, True))
def test_rows_that_do_not_count_are_never_read(device, capturing, monkeypatch):
    """Neither where they are left out nor while a CUDA graph is captured, when zeros take their place."""
    monkeypatch.setattr(_linear_head, "capturing", lambda x: capturing)
    inputs = head_inputs((3, 4), 65, 8, torch.float32, device)
    expected = run(inputs)
    for value, label in ((math.nan, -100), (INF, 65), (-INF, 2**62)):
        for name, result in run(spoilt(inputs, value, label)).items():
            assert_same_bits(name, result, expected[name])
    for name, result in expected.items():
        if name not in ("grad_weight", "grad_bias", "is_top1"):
            assert (result[~inputs["mask"]] == 0).all() and result[inputs["mask"]].any(), name


def test_zeros_in_place_of_rows_change_only_rounding(device, monkeypatch):
    inputs = head_inputs((3, 4), 65, 8, torch.float64, device)
    expected = run(inputs)
    monkeypatch.setattr(_linear_head, "capturing", lambda x: True)
    for name, result in run(inputs).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-12, atol=1e-12, msg=name)


# ---- what a head may hold -------------------------------------------------------------------------------------------


def test_a_bias_of_minus_infinity_bars_a_token(device, small_tiles):
    inputs = head_inputs((2, 3), 40, 8, torch.float32, device)
    barred = torch.arange(40, device=device) % 3 > 0
    barred[:16] = True  # a whole tile
    inputs["bias"][barred] = -INF
    inputs["labels"] = torch.full((2, 3), 18, device=device)
    inputs["mask"][:] = True
    ours = run(inputs)
    kept = inputs | {"weight": inputs["weight"][~barred], "bias": inputs["bias"][~barred]}
    kept["labels"] = torch.full((2, 3), (~barred)[:18].sum().item(), device=device)
    expected = run(kept, reference.linear_statistics)
    assert (ours["mean_logits"] == -INF).all() and not ours["grad_weight"][barred].any()
    for name in ("logprobs", "entropy", "log_sum_sq_probs", "is_top1", "grad_hidden"):
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_hopeless_rows_are_nan_and_alone(device):
    inputs = head_inputs((6,), 30, 8, torch.float32, device)
    inputs["mask"][:] = True
    clean = run(inputs, leaves=("hidden",))
    inputs["hidden"][1, 3], inputs["hidden"][4, 0] = math.nan, INF
    results = run(inputs, leaves=("hidden",))
    for name in ("logprobs", "entropy", "grad_hidden"):
        assert results[name][[1, 4]].isnan().all(), name
    assert not results["is_top1"][[1, 4]].any()
    others = [0, 2, 3, 5]
    for name, result in results.items():
        assert_same_bits(name, result[others], clean[name][others])
    inputs = head_inputs((3,), 30, 8, torch.float32, device) | {"bias": torch.full((30,), -INF, device=device)}
    inputs["mask"][:] = True
    assert run(inputs, leaves=("hidden",))["logprobs"].isnan().all()


@pytest.mark.parametrize("rows", ((), (0,), (2, 0), (1,), (2, 3, 2, 2)), ids=str)
def test_any_leading_shape_and_no_bias(device, rows):
    inputs = head_inputs(rows, 11, 1, torch.float32, device)
    del inputs["bias"]
    ours, expected = run(inputs), run(inputs, reference.linear_statistics)
    for name, result in ours.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_labels_of_padding_are_refused_with_a_hint():
    inputs = head_inputs((2, 3), 7, 4, torch.float32)
    inputs["labels"][1, 2] = -100
    text = r"labels\[1, 2\] must be an id in \[0, 7\), got -100; leave rows without a label out by the mask$"
    with pytest.raises(ValueError, match=rf"^linear_logprobs: {text}"):
        ppo_ext.linear_logprobs(inputs["hidden"], inputs["weight"], inputs["labels"])


def test_a_distributed_weight_is_refused_with_a_hint():
    class DTensor(torch.Tensor):
        def full_tensor(self):
            return self.as_subclass(torch.Tensor)

    inputs = head_inputs((2, 3), 7, 4, torch.float32)
    with pytest.raises(TypeError, match=r"^linear_logprobs: weight must be a plain tensor, got a DTensor; pass weight"):
        ppo_ext.linear_logprobs(inputs["hidden"], inputs["weight"].as_subclass(DTensor), inputs["labels"])


def test_validate_looks_before_anything_is_computed(monkeypatch):
    inputs = head_inputs((2, 3), 7, 4, torch.float32)
    inputs["labels"][0, 1] = 7
    monkeypatch.setattr(_linear_tiles, "Head", None)
    for op in (ppo_ext.linear_logprobs, ppo_ext.linear_logprobs_and_entropy, ppo_ext.linear_statistics):
        with pytest.raises(ValueError, match=rf"^{op.__name__}: labels\[0, 1\] must be an id in \[0, 7\), got 7$"):
            op(inputs["hidden"], inputs["weight"], inputs["labels"], validate=True)


def test_bad_labels_are_noted_without_waiting():
    noted = torch.zeros(4, dtype=torch.int64)
    labels, mask = torch.tensor([[0, 9], [-1, 8]]), torch.tensor([[True, False], [True, True]])
    check_labels.note_labels(noted, labels, mask, 7)
    assert noted.tolist() == [2, 2, -1, 7]
    check_labels.note_labels(noted, labels, None, 7)
    assert noted.tolist() == [5, 2, -1, 7]


# ---- torch ----------------------------------------------------------------------------------------------------------


def test_opcheck(device):
    inputs = head_inputs((2, 3), 17, 4, torch.float32, device)
    tensors = [inputs[name] for name in ("hidden", "weight", "labels", "bias", "mask")]
    ops, temperatures = torch.ops.ppo_ext, torch.rand(2, 3, device=device) + 0.5
    for softcap, note in ((0.0, None), (2.0, torch.zeros(4, dtype=torch.int64, device=device))):
        arguments = (*tensors, temperatures, 1.0, 1.5, softcap)
        torch.library.opcheck(ops._linear_logprobs.default, (*arguments, True, True, note))
        _, entropy, row_max, log_sum, *_ = ops._linear_logprobs(*arguments, True, False, None)
        saved = (inputs["grad_logprobs"], inputs["grad_entropy"], entropy, row_max, log_sum)
        for operator in (ops._linear_logprobs_backward, ops._linear_logprobs_shard_backward):
            torch.library.opcheck(operator.default, (*arguments, *saved, True, True, True))
    tile, targets, numbers = torch.randn(6, 8, device=device), torch.arange(6, device=device), (1.0, 1.0, 0.0, 0, 8)
    memory = (torch.zeros(6, 8, dtype=torch.float64, device=device), torch.zeros(6, 7, device=device))
    torch.library.opcheck(ops._linear_logprobs_fold.default, (tile, targets, None, *memory, *numbers, True, True))
    rows = torch.ones(5, 6, device=device).unbind()
    torch.library.opcheck(ops._linear_logprobs_gradient.default, (tile, targets, None, *rows, *numbers))


def test_compiles_into_one_graph(device):
    inputs = head_inputs((2, 3), 100, 8, torch.float32, device)

    def loss(hidden, weight):
        logprobs, entropy = ppo_ext.linear_logprobs_and_entropy(hidden, weight, inputs["labels"], mask=inputs["mask"])
        return (logprobs - 0.1 * entropy).sum()

    grads = []
    for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):
        leaves = [inputs[name].clone().requires_grad_() for name in ("hidden", "weight")]
        grads.append(torch.autograd.grad(f(*leaves), leaves))
    for a, b in zip(*grads):
        assert_same_bits("gradient", a, b)


def test_same_bits_on_every_run(device):
    inputs = head_inputs((16, 9), 3001, 32, torch.float32, device)
    first, second = run(inputs), run(inputs)
    for name, result in first.items():
        assert_same_bits(name, result, second[name])


@pytest.mark.parametrize("rows", (1, 256, 1024, 8192, 100_000))
def test_a_tile_is_small_beside_the_logits(rows):
    """No more than 16 MB, and from 1024 rows on a tenth of the logits of GPT-2, together with the gradient of hidden."""
    tile_rows, tile_columns = _linear_head.tile_sizes(rows, 50257, "cpu")
    assert tile_rows * tile_columns * 4 <= 16 << 20
    if rows >= 1024:
        assert tile_rows * tile_columns + rows * 768 <= 0.1 * rows * 50257


WEIGHTS = {
    "half precision": lambda weight: weight.bfloat16(),
    "transposed": lambda weight: weight.t().contiguous().t(),
    "off by a row": lambda weight: torch.cat([weight[:1], weight])[1:],
}


@pytest.mark.parametrize("form", WEIGHTS)
def test_parts_of_a_weight_are_copied_into_one_memory(small_tiles, form):
    """New pages for each part would cost more than the copy."""
    inputs = head_inputs((4,), 50, 3, torch.float32)
    weight = WEIGHTS[form](inputs["weight"])
    before = weight.clone()
    head = _linear_head.Head((inputs["hidden"], weight, inputs["labels"], None, None, None), (1.0, 1.0, 0.0))
    parts = [(columns, part.data_ptr(), part.clone()) for columns, part in head.parts()]
    assert len(parts) > 2 and len({address for _, address, _ in parts}) == 1
    for columns, _, part in parts:
        assert_same_bits("part", part, before[columns].float())
    assert_same_bits("weight", weight, before)
