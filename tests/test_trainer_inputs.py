"""What `PPOTrainer.step` refuses: the error texts, and that weights and random state are unchanged."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import tiny_models
import torch

import ppo_ext

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def trainer():
    return tiny_models.trainer()


def valid():
    queries, responses, scores = tiny_models.batch(4, 1)
    return {"queries": queries, "responses": responses, "scores": scores}


def replaced(name, i, value):
    """A batch that is valid except for one sample of one argument."""
    arguments = valid()
    arguments[name][i] = value
    return arguments


def replaced_by(name, change):
    """A batch that is valid except for one sample, which is changed."""
    arguments = masks(ONES, ONES, ONES, ONES)
    arguments[name][1] = change(arguments[name][1])
    return arguments


def masks(*rows):
    arguments = valid()
    arguments["responses"] = [torch.tensor([5, 6, 7])] * 4
    return {**arguments, "response_masks": list(rows)}


ONES = torch.ones(3, dtype=torch.int64)

BAD = {
    "queries is no list": (
        lambda: {**valid(), "queries": torch.ones(4, 3, dtype=torch.int64)},
        TypeError,
        "queries must be a list with one entry per sample, got Tensor",
    ),
    "responses is None": (
        lambda: {**valid(), "responses": None},
        TypeError,
        "responses must be a list with one entry per sample, got NoneType",
    ),
    "scores is a number": (
        lambda: {**valid(), "scores": 1.0},
        TypeError,
        "scores must be a list with one entry per sample, got float",
    ),
    "too few queries": (
        lambda: {**valid(), "queries": valid()["queries"][:3]},
        ValueError,
        "queries must have config.batch_size = 4 entries, got 3",
    ),
    "too many responses": (
        lambda: {**valid(), "responses": valid()["responses"] * 2},
        ValueError,
        "responses must have config.batch_size = 4 entries, got 8",
    ),
    "no scores": (
        lambda: {**valid(), "scores": []},
        ValueError,
        "scores must have config.batch_size = 4 entries, got 0",
    ),
    "query is text": (
        lambda: replaced("queries", 2, "w3 w4"),
        TypeError,
        "queries[2] must be a 1-D tensor of token ids, got str",
    ),
    "response is a list": (
        lambda: replaced("responses", 1, [3, 4]),
        TypeError,
        "responses[1] must be a 1-D tensor of token ids, got list",
    ),
    "query is float": (
        lambda: replaced("queries", 0, torch.tensor([3.0])),
        TypeError,
        "queries[0] must hold integer token ids, got torch.float32",
    ),
    "response is bool": (
        lambda: replaced("responses", 3, torch.tensor([True])),
        TypeError,
        "responses[3] must hold integer token ids, got torch.bool",
    ),
    "query is 2-D": (
        lambda: replaced("queries", 1, torch.ones(1, 3, dtype=torch.int64)),
        ValueError,
        "queries[1] must be a 1-D tensor of token ids, got shape [1, 3]",
    ),
    "response is 0-D": (
        lambda: replaced("responses", 0, torch.tensor(3)),
        ValueError,
        "responses[0] must be a 1-D tensor of token ids, got shape []",
    ),
    "empty response": (
        lambda: replaced("responses", 3, torch.tensor([], dtype=torch.int64)),
        ValueError,
        "responses[3] must hold at least one token, got 0",
    ),
    "empty query": (
        lambda: replaced("queries", 0, torch.tensor([], dtype=torch.int64)),
        ValueError,
        "queries[0] must hold at least one token, got 0",
    ),
    "response beyond the context": (
        lambda: replaced("responses", 1, torch.full((60,), 5)),
        ValueError,
        "queries[1] and responses[1] must together fit the model's context of 48 tokens, got ",
    ),
    "response id beyond the vocabulary": (
        lambda: replaced("responses", 1, torch.tensor([3, 48])),
        ValueError,
        "responses[1][1] must lie in the vocabulary [0, 48), got 48",
    ),
    "negative query id": (
        lambda: replaced("queries", 2, torch.tensor([3, 4, -100])),
        ValueError,
        "queries[2][2] must lie in the vocabulary [0, 48), got -100",
    ),
    "score is NaN": (
        lambda: replaced("scores", 1, torch.tensor(NAN)),
        ValueError,
        "scores[1] must be finite in float32, got nan",
    ),
    "score is inf": (lambda: replaced("scores", 0, INF), ValueError, "scores[0] must be finite in float32, got inf"),
    "score overflows float32": (
        lambda: replaced("scores", 3, 1e300),
        ValueError,
        "scores[3] must be finite in float32, got inf",
    ),
    "score is text": (
        lambda: replaced("scores", 2, "good"),
        TypeError,
        "scores[2] must be a number or a tensor of one element, got str",
    ),
    "score is None": (
        lambda: replaced("scores", 2, None),
        TypeError,
        "scores[2] must be a number or a tensor of one element, got NoneType",
    ),
    "score is a numpy text": (
        lambda: replaced("scores", 2, np.str_("3")),
        TypeError,
        "scores[2] must be a number or a tensor of one element, got str_",
    ),
    "score is a numpy complex": (
        lambda: replaced("scores", 1, np.complex64(1j)),
        TypeError,
        "scores[1] must be a real number, got torch.complex64",
    ),
    "score is an array of two": (
        lambda: replaced("scores", 1, np.ones(2)),
        ValueError,
        "scores[1] must be a single number, got a tensor of shape [2]",
    ),
    "numpy NaN": (
        lambda: replaced("scores", 1, np.float16("nan")),
        ValueError,
        "scores[1] must be finite in float32, got nan",
    ),
    "score has two elements": (
        lambda: replaced("scores", 2, torch.ones(2)),
        ValueError,
        "scores[2] must be a single number, got a tensor of shape [2]",
    ),
    "score is 2-D": (
        lambda: replaced("scores", 0, torch.ones(1, 1)),
        ValueError,
        "scores[0] must be a single number, got a tensor of shape [1, 1]",
    ),
    "score is complex": (
        lambda: replaced("scores", 0, torch.tensor(1j)),
        TypeError,
        "scores[0] must be a real number, got torch.complex64",
    ),
    "score is no float": (
        lambda: replaced("scores", 3, 10**400),
        ValueError,
        "scores[3] must be finite in float32, got int too large to convert to float",
    ),
    "score is a fraction that is no float": (
        lambda: replaced("scores", 3, Fraction(10**400, 3)),
        ValueError,
        "scores[3] must be finite in float32, got integer division result too large for a float",
    ),
    **{
        f"{argument} on the meta device": (
            lambda argument=argument: replaced_by(argument, lambda x: x.to("meta")),
            TypeError,
            f"{argument}[1] must be a dense tensor with values, got one on the meta device",
        )
        for argument in ("queries", "responses", "scores", "response_masks")
    },
    **{
        f"{argument} sparse": (
            lambda argument=argument: replaced_by(argument, lambda x: x.reshape(-1).to_sparse()),
            TypeError,
            f"{argument}[1] must be a dense tensor, got torch.sparse_coo",
        )
        for argument in ("queries", "responses", "scores", "response_masks")
    },
    **{
        f"{argument} nested": (
            lambda argument=argument: replaced_by(argument, lambda x: torch.nested.as_nested_tensor([x])),
            TypeError,
            f"{argument}[1] must be a dense tensor, got a nested one",
        )
        for argument in ("queries", "responses", "scores", "response_masks")
    },
    "score is quantized": (
        lambda: replaced_by("scores", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        TypeError,
        "scores[1] must be a dense tensor with values, got a quantized one",
    ),
    "too few masks": (lambda: masks(ONES), ValueError, "response_masks must have config.batch_size = 4 entries, got 1"),
    "masks are a tensor": (
        lambda: {**masks(), "response_masks": torch.ones(4, 3)},
        TypeError,
        "response_masks must be a list with one entry per sample, got Tensor",
    ),
    "mask is a list": (
        lambda: masks(ONES, [1, 1, 1], ONES, ONES),
        TypeError,
        "response_masks[1] must be a 1-D tensor, got list",
    ),
    "mask is too short": (
        lambda: masks(ONES, ONES, ONES[:2], ONES),
        ValueError,
        "response_masks[2] must have the shape [3] of responses[2], got [2]",
    ),
    "mask counts nothing": (
        lambda: masks(ONES, ONES, ONES, 0 * ONES),
        ValueError,
        "response_masks[3] must leave at least one token that counts, got [0, 0, 0]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_rejects(trainer, case):
    arguments, kind, text = BAD[case]
    before, coefficient = tiny_models.weights(trainer), trainer.kl_ctl.value
    random_state = np.random.get_state()[1].copy()
    with pytest.raises(kind) as error:
        trainer.step(**arguments())
    assert str(error.value).startswith(f"PPOTrainer.step: {text}"), str(error.value)
    for name, parameter in tiny_models.weights(trainer).items():
        assert torch.equal(parameter, before[name])
    assert trainer.kl_ctl.value == coefficient and (np.random.get_state()[1] == random_state).all()


def test_rejects_a_response_without_a_token_that_counts_in_an_encoder_decoder():
    trainer = tiny_models.trainer("t5")
    queries, responses, scores = tiny_models.batch(4, 1, start_token=0)
    responses[1] = responses[1][:2]
    with pytest.raises(
        ValueError, match=r"responses\[1\] must hold at least 3 tokens for an encoder-decoder model, got 2"
    ):
        trainer.step(queries, responses, scores)


@pytest.mark.parametrize(
    "convert",
    [
        lambda score: score.reshape(1),
        float,
        lambda score: score.double(),
        lambda score: np.float32(score),
        lambda score: np.float64(score),
        lambda score: score.numpy(),
        lambda score: score.reshape(1).numpy(),
        lambda score: score.clone().requires_grad_(),
    ],
    ids=["1-D", "float", "float64", "np.float32", "np.float64", "0-D array", "1-D array", "requires_grad"],
)
def test_accepts_scores_in_every_form(convert):
    def one_step(form):
        trainer = tiny_models.trainer()
        queries, responses, scores = tiny_models.batch(4, 1)
        stats = trainer.step(queries, responses, [form(score) for score in scores])
        return {key: value for key, value in stats.items() if not key.startswith("time/")}

    expected, got = one_step(lambda score: score), one_step(convert)
    for key, value in expected.items():
        assert np.array_equal(got[key], value), key


@pytest.mark.parametrize(
    "scores",
    [
        [1, 0, 3, -2],
        [torch.tensor(i) for i in (1, 0, 3, -2)],
        (True, False, 3, -2),
        [np.True_, np.False_, np.uint8(3), np.int64(-2)],
        [np.float16(1), np.array(False), np.array([3]), np.longdouble(-2)],
    ],
    ids=repr,
)
def test_accepts_integer_scores(trainer, scores):
    queries, responses, _ = tiny_models.batch(4, 1)
    assert trainer.step(queries, responses, scores)["ppo/mean_scores"] == 0.5


def test_accepts_int32_ids_and_masks_of_every_dtype(trainer):
    queries, responses, scores = tiny_models.batch(4, 1)
    response_masks = [
        torch.ones(len(ids), dtype=dtype)
        for ids, dtype in zip(responses, (torch.bool, torch.int32, torch.float32, torch.int64), strict=True)
    ]
    stats = trainer.step([ids.int() for ids in queries], [ids.int() for ids in responses], scores, response_masks)
    assert np.isfinite(stats["ppo/loss/total"])


def test_inputs_are_not_changed(trainer):
    queries, responses, scores = tiny_models.batch(4, 1)
    copies = [[tensor.clone() for tensor in tensors] for tensors in (queries, responses, scores)]
    trainer.step(queries, responses, scores)
    for tensors, expected in zip((queries, responses, scores), copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


PAD, EOS = tiny_models.PAD, tiny_models.EOS


def padded(side, *, responses=True, by=(2, 0, 1, 3), pad=PAD):
    """A batch whose responses, or queries, are padded."""
    arguments = valid()
    name = "responses" if responses else "queries"
    filler = [torch.full((count,), pad) for count in by]
    pairs = zip(arguments[name], filler, strict=True)
    arguments[name] = [torch.cat([ids, fill] if side == "right" else [fill, ids]) for ids, fill in pairs]
    return arguments


def masks_of(arguments, name="responses"):
    return [(ids != PAD).long() for ids in arguments[name]]


WARNED = {
    "responses to a common length": (lambda: padded("right"), 0, 6),
    "left-padded queries": (lambda: padded("left", responses=False), 6, 0),
    "right-padded queries": (lambda: padded("right", responses=False), 6, 0),
    "one padding token": (lambda: padded("right", by=(0, 0, 0, 1)), 0, 1),
    "an end id once more": (lambda: padded("right", pad=EOS), 0, 3),  # the first of each row ends it
    "masks that count it": (
        lambda: {**padded("right"), "response_masks": [torch.ones(len(ids)) for ids in padded("right")["responses"]]},
        0,
        6,
    ),
}


@pytest.mark.parametrize("case", WARNED)
def test_padding_that_came_in_is_counted_and_warned_of_once(case):
    batch, in_queries, in_responses = WARNED[case]
    trainer = tiny_models.trainer(ppo_epochs=1)
    if case == "an end id once more":
        trainer.tokenizer.pad_token = "<eos>"
    text = f"{in_queries} tokens at the ends of queries and {in_responses} at the ends of responses are padding"
    with pytest.warns(
        UserWarning,
        match=rf"PPOTrainer.step: {text} \(id \d\), and count like all others; strip it, as in ids\[attention",
    ):
        trainer.step(**batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step(**batch())


NOT_WARNED = {
    "no padding": valid,
    "masked": lambda: {**padded("right"), "response_masks": masks_of(padded("right"))},
    "inside": lambda: replaced("responses", 1, torch.tensor([5, PAD, PAD, 6])),
    "a padding id in front of a response": lambda: padded("left"),
    "an end id at the end": lambda: padded("right", by=(1, 1, 1, 1), pad=EOS),
}


@pytest.mark.parametrize("case", NOT_WARNED)
def test_no_warning_where_there_is_no_padding_that_counts(case):
    trainer = tiny_models.trainer(ppo_epochs=1)
    if case == "an end id at the end":
        trainer.tokenizer.pad_token = "<eos>"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.step(**NOT_WARNED[case]())
    assert [str(warning.message) for warning in told] == []


def test_an_id_that_the_reference_does_not_know_is_refused():
    """As after tokens were added to the policy alone."""
    trainer = tiny_models.trainer()
    trainer.model.pretrained_model.resize_token_embeddings(50, mean_resizing=False)
    both = ppo_ext.PPOTrainer(trainer.config, trainer.model, trainer.ref_model, trainer.tokenizer)
    before = tiny_models.weights(both)
    with pytest.raises(ValueError) as error:
        both.step(**replaced("responses", 2, torch.tensor([3, 49])))
    assert str(error.value) == (
        "PPOTrainer.step: responses[2][1] must lie in the reference model's vocabulary [0, 48), got 49"
    )
    tiny_models.assert_unmoved(before, both)
    both.step(**valid())


@pytest.mark.parametrize(
    "argument, value, text",
    [
        ("config", {}, "config must be a PPOConfig, got dict"),
        ("model", torch.nn.Linear(1, 1), "model must be a model with a value head, such as .*, got Linear"),
        ("ref_model", "gpt2", "ref_model must be None or a model with a value head, .*, got str"),
        ("tokenizer", None, "tokenizer must be a transformers tokenizer, got NoneType"),
        ("dataset", 3, "dataset must be a torch or datasets Dataset, got int"),
        ("lr_scheduler", 3, "lr_scheduler must be a torch LRScheduler, got int"),
    ],
)
def test_constructor_rejects(trainer, argument, value, text):
    arguments = {"config": trainer.config, "model": trainer.model, "tokenizer": trainer.tokenizer}
    with pytest.raises(TypeError, match=f"PPOTrainer: {text}"):
        ppo_ext.PPOTrainer(**{**arguments, argument: value})
