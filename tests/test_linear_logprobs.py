"""linear_logprobs, linear_logprobs_and_entropy and linear_statistics: their numbers and gradients against float64."""

import pytest
import torch
from cases import FLOATS
from conftest import assert_same_bits, assert_within_torch_error
from linear_head import LEAVES, OPTIONS, head_inputs, make_tiles_small, record_products, run

import ppo_ext
from ppo_ext.ops import reference


@pytest.fixture
def small_tiles(monkeypatch):
    make_tiles_small(monkeypatch)


@pytest.fixture
def products(monkeypatch):
    return record_products(monkeypatch)


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
