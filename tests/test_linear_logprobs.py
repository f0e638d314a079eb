"""linear_logprobs, linear_logprobs_and_entropy and linear_statistics against float64 and logprobs, and their tiles."""

import math

import pytest
import torch
from cases import FLOATS
from conftest import assert_same_bits, assert_within_torch_error

import ppo_ext
from ppo_ext.ops import _linear_gradients, _linear_head, _linear_tiles, check_labels, reference

INF = math.inf
OPTIONS = {
    "plain": {},
    "tempered": {"temperature": 0.7},
    "scaled and capped": {"temperature": 0.7, "logit_scale": 1.5, "softcap": 2.0},
}
LEAVES = ("hidden", "weight", "bias")


def head_inputs(shape, V, H, dtype, device="cpu"):
    """hidden [..., H], weight [V, H], bias [V], labels, mask and the incoming gradients of the two results."""
    return {
        "hidden": torch.randn(*shape, H, device=device).to(dtype),
        "weight": (torch.randn(V, H, device=device) * 3.0 / H**0.5).to(dtype),
        "bias": torch.randn(V, device=device).to(dtype),
        "labels": torch.randint(V, shape, device=device),
        "mask": torch.rand(shape, device=device) > 0.3,
        "grad_logprobs": torch.randn(shape, device=device),
        "grad_entropy": torch.randn(shape, device=device),
    }


def run(inputs, op=ppo_ext.linear_statistics, leaves=LEAVES, dtype=None, **options):
    """All results and, as grad_<name>, the gradients of a random combination of the first two."""
    tensors = {name: inputs[name].to(dtype or inputs[name].dtype).detach() for name in LEAVES if name in inputs}
    leaves = [name for name in leaves if name in tensors]
    for name in leaves:
        tensors[name].requires_grad_()
    results = op(**tensors, labels=inputs["labels"], mask=inputs["mask"], **options)
    loss = (results[0] * inputs["grad_logprobs"]).sum() + (results[1] * inputs["grad_entropy"]).sum()
    grads = torch.autograd.grad(loss, [tensors[name] for name in leaves])
    found = dict(zip(ppo_ext.ops.linear_logprobs.LinearStatistics._fields, [x.detach() for x in results]))
    return found | {f"grad_{name}": grad for name, grad in zip(leaves, grads)}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 rows and 16 columns, so that small inputs have many of both."""
    monkeypatch.setitem(_linear_head._SIZES, "cpu", (4, 64))
    monkeypatch.setitem(_linear_head._SIZES, "cuda", (4, 64))


@pytest.fixture
def products(monkeypatch):
    """The shapes of the factors of every matrix product."""
    shapes, multiply = [], _linear_head.multiply

    def recorded(a, b, out, add=False):
        shapes.append((tuple(a.shape), tuple(b.shape)))
        multiply(a, b, out, add)

    monkeypatch.setattr(_linear_gradients, "multiply", recorded)
    monkeypatch.setattr(_linear_head, "multiply", recorded)
    return shapes


# ---- the numbers ----------------------------------------------------------------------------------------------------

# softcap, logit_scale, temperature; logprobs, entropy, log_sum_sq_probs, mean_logits of two rows: of TRL 1.16.0
WORKED = (
    (None, 1, 1, (-1.038737, -1.767379, 1.538407, 1.592162, -1.461052, -1.576416, 0.244, 0.08)),
    (None, 1, 0.7, (-0.838705, -1.845450, 1.457934, 1.575496, -1.304350, -1.546314, 0.348571, 0.114286)),
    (2.0, 1.5, 0.7, (-0.674070, -1.983828, 1.347543, 1.539817, -1.119263, -1.486304, 0.473624, 0.168961)),
)


@pytest.mark.parametrize("library", (ppo_ext, reference), ids=("ppo_ext", "reference"))
@pytest.mark.parametrize("softcap, logit_scale, temperature, expected", WORKED)
def test_numbers_of_trl(library, softcap, logit_scale, temperature, expected):
    hidden = torch.tensor([[0.1, -0.2, 0.3], [0.5, 0.4, -0.1]])
    weight = torch.tensor(
        [[0.2, 0.1, -0.3], [0.4, -0.5, 0.6], [-0.7, 0.8, 0.9], [1, -1.1, 1.2], [0.3, 0.2, 0.1]],
    )
    options = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    options["bias"] = torch.tensor([0.1, 0, -0.1, 0.2, 0.05])
    *found, is_top1 = library.linear_statistics(hidden, weight, torch.tensor([3, 1]), **options)
    torch.testing.assert_close(torch.cat(found), torch.tensor(expected), rtol=0, atol=2e-6)
    assert is_top1.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("V", (1, 2, 7, 33, 1000, 9001))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_matches_float64(device, V, dtype, options):
    inputs = head_inputs((3, 5), V, 16, dtype, device)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    ours = run(inputs, **options)
    torchs, exact = (run(inputs, reference.linear_statistics, dtype=to, **options) for to in (single, torch.float64))
    for name, result in ours.items():
        assert result.dtype == (dtype if name.startswith("grad") else single)
        # a gradient of half precision is rounded once; a product is a sum of terms of the size of 4
        rounded = torchs[name].to(result.dtype)
        assert_within_torch_error(name, result, rounded, exact[name], units=8, scale=4.0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tiles_of_rows_and_columns_add_up(device, options, small_tiles):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        inputs = head_inputs((3, 7), 203, 8, dtype, device)
        single = torch.float64 if dtype == torch.float64 else torch.float32
        ours = run(inputs, **options)
        torchs, exact = (
            run(inputs, reference.linear_statistics, dtype=to, **options) for to in (single, torch.float64)
        )
        for name, result in ours.items():
            assert_within_torch_error(name, result, torchs[name].to(result.dtype), exact[name], units=8, scale=4.0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_is_multiplied_exactly(device, dtype):
    inputs = head_inputs((4, 8), 5000, 64, dtype, device)
    ours, exact = run(inputs), run(inputs, reference.linear_statistics, dtype=torch.float64)
    for name in ("logprobs", "entropy"):
        assert (ours[name] - exact[name]).abs().max() <= 1e-5


def test_mixed_dtypes_are_the_numbers_as_they_are(device):
    inputs = head_inputs((2, 3), 50, 8, torch.bfloat16, device)
    expected = run(inputs, dtype=torch.float32)
    for mixed in ("hidden", "weight", "bias"):
        results = run(inputs | {mixed: inputs[mixed].float()})
        for name in ("logprobs", "entropy"):
            assert_same_bits(name, results[name], expected[name])
        for name in LEAVES:
            assert results[f"grad_{name}"].dtype == (torch.float32 if name == mixed else torch.bfloat16)


def test_the_three_ops_have_the_same_bits(device):
    inputs = head_inputs((2, 3), 100, 8, torch.float32, device)
    arguments = {name: inputs[name] for name in ("hidden", "weight", "labels", "bias", "mask")}
    logprobs, entropy = ppo_ext.linear_logprobs_and_entropy(**arguments)
    every = ppo_ext.linear_statistics(**arguments)
    assert_same_bits("logprobs", ppo_ext.linear_logprobs(**arguments), logprobs)
    assert_same_bits("logprobs", every.logprobs, logprobs)
    assert_same_bits("entropy", every.entropy, entropy)


def test_only_the_outputs_asked_for(device):
    inputs = head_inputs((2, 3), 100, 8, torch.float32, device)
    arguments = {name: inputs[name] for name in ("hidden", "weight", "labels", "bias", "mask")}
    every = ppo_ext.linear_statistics(**arguments)
    for outputs in (("logprobs",), ("entropy", "is_top1"), ("mean_logits",), ("log_sum_sq_probs", "logprobs"), ()):
        found = ppo_ext.linear_statistics(**arguments, outputs=outputs)
        for name, result in found._asdict().items():
            if name in outputs:
                assert_same_bits(name, result, getattr(every, name))
            else:
                assert result is None


def test_a_tie_with_an_earlier_id_is_not_the_top(device, small_tiles):
    """Each of 40 tokens is its own label in turn; three of them share the largest logit, two of them in one tile."""
    weight = torch.zeros(40, 1, device=device)
    weight[[5, 7, 33]] = 1.0
    labels = torch.arange(40, device=device)
    found = ppo_ext.linear_statistics(torch.ones(40, 1, device=device), weight, labels).is_top1
    assert found.nonzero().flatten().tolist() == [5]
    assert ppo_ext.linear_statistics(torch.zeros(1, 1), torch.zeros(4, 1), torch.tensor([0])).is_top1.tolist() == [1]


@pytest.mark.parametrize("equal", [(700, 1500, 2999), (4, 1024, 2048)], ids=str)
def test_the_first_of_equal_logits_in_one_wide_tile(device, equal):
    """On CUDA, each of a row's threads reads several pieces of it: the first id may be in a later thread's piece."""
    weight = torch.zeros(3000, 1, device=device)
    weight[list(equal)] = 1.0
    labels = torch.tensor(equal, device=device)
    assert ppo_ext.linear_statistics(torch.ones(3, 1, device=device), weight, labels).is_top1.tolist() == [1, 0, 0]


def test_statistics_have_no_gradient(device):
    inputs = head_inputs((2, 3), 20, 8, torch.float32, device)
    hidden = inputs["hidden"].requires_grad_()
    found = ppo_ext.linear_statistics(hidden, inputs["weight"], inputs["labels"])
    assert [x.requires_grad for x in found] == [True, True, False, False, False]


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", (0, 1))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_float64(device, output, options, small_tiles):
    inputs = head_inputs((2, 3), 21, 4, torch.float64, device)
    leaves = [inputs[name].requires_grad_() for name in LEAVES]

    def result(hidden, weight, bias):
        rest = {"labels": inputs["labels"], "mask": inputs["mask"], "bias": bias, **options}
        return ppo_ext.linear_logprobs_and_entropy(hidden, weight, **rest)[output]

    assert torch.autograd.gradcheck(result, leaves)


def test_a_gradient_of_the_entropy_alone(device):
    inputs = head_inputs((2, 3), 21, 4, torch.float64, device)
    grads = []
    for library in (ppo_ext, reference):
        leaves = [inputs[name].clone().requires_grad_() for name in ("hidden", "weight")]
        entropy = library.linear_statistics(*leaves, inputs["labels"], outputs=("entropy",)).entropy if library is ppo_ext \
            else library.linear_logprobs_and_entropy(*leaves, inputs["labels"])[1]  # fmt: skip
        grads.append(torch.autograd.grad((entropy * inputs["grad_entropy"]).sum(), leaves))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("leaves", (("hidden",), ("weight",), ("bias",), ("hidden", "weight")), ids=str)
def test_only_the_products_that_a_gradient_needs(device, leaves, products):
    inputs = head_inputs((2, 3), 21, 4, torch.float32, device)
    inputs["mask"][:] = True
    expected = run(inputs)
    products.clear()
    results = run(inputs, leaves=leaves)
    logits, of_hidden, of_weight = ((6, 4), (4, 21)), ((6, 21), (21, 4)), ((21, 6), (6, 4))
    wanted = [logits, logits] + [of_hidden] * ("hidden" in leaves) + [of_weight] * ("weight" in leaves)
    assert sorted(products) == sorted(wanted)
    for name, result in results.items():
        assert_same_bits(name, result, expected[name])


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
        torch.library.opcheck(ops._linear_logprobs_backward.default, (*arguments, *saved, True, True, True))
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
