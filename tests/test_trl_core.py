"""ppo_ext.trl.core against trl.core of TRL 0.11.4, name by name."""

import numpy as np
import pytest
import tiny_models
import torch
from conftest import require_trl

from ppo_ext.trl import core


@pytest.fixture
def theirs():
    return require_trl().core


@pytest.fixture
def tokens():
    return torch.randn(3, 5), torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 1]])


def close(got, expected, atol=1e-6):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=atol)


def test_logprobs_from_logits(theirs):
    logits, labels = 3 * torch.randn(2, 4, 11), torch.randint(0, 11, (2, 4))
    close(core.logprobs_from_logits(logits, labels), theirs.logprobs_from_logits(logits, labels))
    every = core.logprobs_from_logits(logits, None, gather=False)
    close(every, theirs.logprobs_from_logits(logits, None, gather=False))


def test_logprobs_from_logits_gradient(theirs):
    logits, labels, weights = torch.randn(2, 4, 11), torch.randint(0, 11, (2, 4)), torch.randn(2, 4)
    grads = []
    for library in (core, theirs):
        leaf = logits.clone().requires_grad_()
        (library.logprobs_from_logits(leaf, labels) * weights).sum().backward()
        grads.append(leaf.grad)
    close(*grads)


def test_logprobs_from_half_precision_logits_are_float32():
    logits = torch.randn(2, 4, 11).bfloat16()
    assert core.logprobs_from_logits(logits, torch.zeros(2, 4, dtype=torch.int64)).dtype == torch.float32


def test_entropy_from_logits(theirs):
    logits = 3 * torch.randn(2, 4, 11)
    # TRL's own error against float64 is about 1e-5
    close(core.entropy_from_logits(logits), theirs.entropy_from_logits(logits), atol=1e-5)
    logits[..., 0] = -float("inf")
    assert theirs.entropy_from_logits(logits).isnan().all()
    close(core.entropy_from_logits(logits), theirs.entropy_from_logits(logits[..., 1:]), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize(
    "name, options",
    [
        ("masked_mean", {}),
        ("masked_mean", {"axis": 1}),
        ("masked_var", {}),
        ("masked_var", {"unbiased": False}),
        ("masked_whiten", {}),
        ("masked_whiten", {"shift_mean": False}),
    ],
    ids=str,
)
def test_masked_moments(theirs, tokens, name, options, dtype):
    values, mask = tokens
    close(getattr(core, name)(values, mask.to(dtype), **options), getattr(theirs, name)(values, mask, **options))


def test_one_token_is_no_nan(theirs):
    values, mask = torch.tensor([[2.0, 3.0]]), torch.tensor([[1, 0]])
    assert theirs.masked_whiten(values, mask).isnan().all()
    assert core.masked_var(values, mask) == 0
    assert core.masked_whiten(values, mask).isfinite().all() and core.masked_whiten(values, mask)[0, 0] == 0


def test_nan_under_the_mask_does_not_spread(theirs):
    values, mask = torch.tensor([[2.0, float("nan"), 4.0]]), torch.tensor([[1, 0, 1]])
    assert theirs.masked_mean(values, mask).isnan()
    assert core.masked_mean(values, mask) == 3


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(theirs, shift_mean):
    values = torch.randn(4, 6)
    close(core.whiten(values, shift_mean), theirs.whiten(values, shift_mean))


def test_clip_by_value(theirs):
    x, low, high = torch.randn(5), torch.full((5,), -0.3), torch.full((5,), 0.4)
    assert torch.equal(core.clip_by_value(x, low, high), theirs.clip_by_value(x, low, high))
    assert torch.equal(core.clip_by_value(x, -0.3, 0.4), core.clip_by_value(x, low, high))


def test_dicts(theirs):
    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3, "f": {}}
    assert core.flatten_dict(nested) == theirs.flatten_dict(nested) == {"a/b": 1, "a/c/d": 2, "e": 3}
    with pytest.raises(ValueError, match="flatten_dict: keys must not contain the separator '/', got 'a/b'"):
        core.flatten_dict({"a/b": 1})
    dicts = [{"x": torch.tensor(1.0), "y": torch.ones(2, 2)}, {"x": torch.tensor(2.0), "y": torch.ones(3)}]
    got, expected = core.stack_dicts(dicts), theirs.stack_dicts(dicts)
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    assert core.WANDB_PADDING == theirs.WANDB_PADDING
    assert core.add_suffix({"a": 1}, "_x") == {"a_x": 1}


def test_stats_to_host(theirs):
    stats = {
        "bf16": torch.tensor([1.5, 2.0]).bfloat16(),
        "scalar": torch.tensor(2.0),
        "int": 3,
        "array": np.ones(2),
        "one": torch.ones(1),
        "numpy": np.float32(0.5),
        "grad": torch.ones(2, requires_grad=True),
    }
    got, expected = core.stats_to_np(stats), theirs.stats_to_np(stats)
    for key, value in expected.items():
        assert type(got[key]) is type(value) and np.array_equal(got[key], value), key
    got, expected = core.convert_to_scalar(got), theirs.convert_to_scalar(expected)
    assert {key: type(value) for key, value in got.items()} == {key: type(value) for key, value in expected.items()}


@pytest.mark.parametrize(
    "options",
    [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.5}, {"top_k": 1, "min_tokens_to_keep": 2}],
    ids=str,
)
def test_top_k_top_p_filtering(theirs, options):
    logits = torch.randn(4, 9)
    got, expected = (
        core.top_k_top_p_filtering(logits, **options),
        theirs.top_k_top_p_filtering(logits.clone(), **options),
    )
    assert torch.equal(got, expected)


def test_respond_to_batch(theirs):
    embedding = torch.nn.Embedding(7, 7)
    drawn = []
    for library in (core, theirs):
        torch.manual_seed(3)
        drawn.append(
            library.respond_to_batch(lambda ids: (embedding(ids),), torch.zeros(2, 1, dtype=torch.int64), 6, top_k=4)
        )
    assert torch.equal(*drawn) and drawn[0].shape == (2, 6)


def test_length_sampler_and_seed(theirs):
    drawn = []
    for library in (core, theirs):
        library.set_seed(5)
        sample = library.LengthSampler(2, 9)
        drawn.append([int(sample()) for _ in range(8)] + [torch.rand(()).item()])
    assert drawn[0] == drawn[1] and min(drawn[0][:8]) >= 2 and max(drawn[0][:8]) < 9


def test_randn_tensor(theirs):
    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    assert torch.equal(
        core.randn_tensor((3, 4), generators()), theirs.randn_tensor((3, 4), generators(), torch.device("cpu"))
    )
    one = core.randn_tensor((3, 4), torch.Generator().manual_seed(1))
    assert torch.equal(one, theirs.randn_tensor((3, 4), torch.Generator().manual_seed(1), torch.device("cpu")))


def test_pad_to_size():
    assert core.pad_to_size(torch.tensor([1, 2]), 4, padding=9).tolist() == [1, 2, 9, 9]
    assert core.pad_to_size(torch.ones(2, 2), 3, padding=0).tolist() == [[1, 1, 0], [1, 1, 0]]


def test_average_torch_dicts():
    dicts = [
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)},
        {"a": torch.tensor([3.0, 6.0]), "b": torch.tensor(5.0)},
    ]
    averages = core.average_torch_dicts(dicts)
    assert averages["a"].tolist() == [2.0, 4.0] and averages["b"].item() == 4.0 and len(averages) == 2


def test_listify_batch():
    rows = core.listify_batch(torch.tensor([[1, 2], [3, 4]]))
    assert isinstance(rows, list) and [row.tolist() for row in rows] == [[1, 2], [3, 4]]


def test_build_bert_batch_from_txt():
    tokenizer = tiny_models.tokenizer()
    ids, mask = core.build_bert_batch_from_txt(["w5 w6 w7", "w8"], tokenizer, "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and ids.dtype == torch.int64
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]] and mask.dtype == torch.float32


@pytest.mark.parametrize("kind", ["cuda", "device"])
def test_cache_decorators(kind, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(kind))
    empty = getattr(core.PPODecorators, f"empty_{kind}_cache")
    with empty():
        pass
    assert not emptied
    monkeypatch.setattr(core.PPODecorators, f"optimize_{kind}_cache", True)

    @empty()
    def answer():
        return 42

    assert answer() == 42 and emptied == [kind]


def test_every_name_of_the_module_is_here(theirs):
    public = {name for name, value in vars(theirs).items() if getattr(value, "__module__", None) == theirs.__name__}
    assert public <= set(core.__all__), public - set(core.__all__)
