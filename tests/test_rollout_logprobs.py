"""`step(rollout_logprobs=...)`: weights, statistics, and the cause of a mismatch, on generated log-probabilities."""

import math
import warnings

import pytest
import tiny_models
import torch
from test_critic import same, state
from tiny_models import weights

import ppo_ext
from ppo_ext.ops import reference
from ppo_ext.ops.rollout_weights import STAT_NAMES
from ppo_ext.trainer import training

VOCAB = tiny_models.VOCAB


def trainer(name="llama", **config):
    settings = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 1}
    return tiny_models.trainer(name, **{**settings, **config})


def batch(ours, seed=3):
    """Queries and responses that the policy has sampled, of different lengths."""
    queries, _, scores = tiny_models.batch(ours.config.batch_size, seed)
    torch.manual_seed(seed)
    lengths = iter([5, 9, 12, 7, 10, 6, 11, 8] * 8)
    responses = ours.generate(
        queries,
        batch_size=1,
        length_sampler=lambda: next(lengths),
        return_prompt=False,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
        suppress_tokens=[0, 1],
    )
    return queries, responses, scores


@torch.no_grad()
def engine(ours, queries, responses, change=lambda logits: logits):
    """The log-probabilities of the responses by logits that are changed, of each sample alone."""
    model, found = ours.model.pretrained_model.eval(), []
    for query, response in zip(queries, responses, strict=True):
        logits = change(model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1])
        found.append(logits.log_softmax(-1).gather(1, response[:, None]).squeeze(1))
    return found


def hot(temperature):
    return lambda logits: logits / temperature


def top_k(k):
    return lambda logits: logits.masked_fill(logits < logits.topk(k)[0][:, -1:], -math.inf)


def top_p(p):
    def cut(logits):
        ordered, order = logits.sort(descending=True)
        kept = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1) < p
        return torch.full_like(logits, -math.inf).scatter(1, order, ordered.masked_fill(~kept, -math.inf))

    return cut


def sampled_with(change):
    """Responses sampled with changed logits, and the engine's log-probabilities."""

    def make(ours, queries, responses):
        model, new = ours.model.pretrained_model.eval(), []
        for query, response in zip(queries, responses, strict=True):
            ids = query
            for _ in response:
                with torch.no_grad():
                    logits = change(model(ids[None]).logits[0, -1:])
                ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)[0]])
            new.append(ids[len(query) :])
        return new, engine(ours, queries, new, change)

    return make


def scored(change):
    """The responses as they are, scored by a changed engine."""
    return lambda ours, queries, responses: (responses, change(ours, queries, responses))


def shifted(by):
    return lambda ours, q, r: [row.roll(by) for row in engine(ours, q, r)]


def left_padded(ours, queries, responses):
    """An engine that pads queries on the left and tells the model nothing of it."""
    width = max(map(len, queries))
    padded = [torch.nn.functional.pad(query, (width - len(query), 0), value=5) for query in queries]
    return engine(ours, padded, responses)


def in_bfloat16(ours, queries, responses):
    model = ours.model.pretrained_model.to(torch.bfloat16)
    found = engine(ours, queries, responses, lambda logits: logits.float())
    model.to(torch.float32)
    return found


def rounded(ours, queries, responses):
    """The logits of an engine whose arithmetic has a relative error of a few percent."""
    generator = torch.Generator().manual_seed(0)
    return engine(ours, queries, responses, lambda x: x + 0.1 * torch.randn(x.shape, generator=generator))


def other_weights(ours, queries, responses):
    with torch.no_grad():
        before = [p.clone() for p in ours.model_params]
        for i, p in enumerate(ours.model_params):
            p += p.std(correction=0) * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        found = engine(ours, queries, responses)
        for p, old in zip(ours.model_params, before, strict=True):
            p.copy_(old)
    return found


CASES = {
    "temperature 0.7": (sampled_with(hot(0.7)), r"cause is a temperature of 0\.70: "),
    "temperature 1.5": (sampled_with(hot(1.5)), r"cause is a temperature of 1\.50: "),
    "temperature 1.1": (sampled_with(hot(1.1)), r"cause is a temperature of 1\.10: "),
    "top_k 5": (sampled_with(top_k(5)), "cause is top_k = 5, renormalised: "),
    "top_k 20": (sampled_with(top_k(20)), "cause is top_k = 20, renormalised: "),
    "top_p 0.9": (sampled_with(top_p(0.9)), r"cause is top_p = 0\.90, renormalised: "),
    "top_p 0.5": (sampled_with(top_p(0.5)), r"cause is top_p = 0\.50, renormalised: "),
    "both": (
        sampled_with(lambda x: top_p(0.9)(x / 0.7)),
        r"cause is a temperature of 0\.(69|70|71) and top_p = 0\.90, renormalised: ",
    ),
    "before": (scored(shifted(1)), "cause is a shift: each is about the token before"),
    "after": (scored(shifted(-1)), "cause is a shift: each is about the token after"),
    "padding": (scored(left_padded), "cause is padding: all samples differ but the longest"),
    "precision": (scored(rounded), "cause is precision: both signs are about as frequent"),
    "weights": (scored(other_weights), "cause is none of temperature, top_k, top_p, padding, shift and precision"),
}


@pytest.mark.parametrize("seed", [3, 4, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_the_cause_of_a_mismatch_is_named(case, name, seed):
    make, text = CASES[case]
    ours = trainer(name)
    queries, responses, scores = batch(ours, seed)
    responses, given = make(ours, queries, responses)
    with pytest.warns(UserWarning, match=f"rollout_logprobs differ from the policy's own.*{text}"):
        ours.step(queries, responses, scores, rollout_logprobs=given)


@pytest.mark.parametrize("name, side", [("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("t5", "right")])
@pytest.mark.parametrize("change", [None, in_bfloat16])
def test_what_agrees_is_no_mismatch(name, side, change):
    ours = trainer(name, padding_side=side)
    if name == "t5":
        queries, responses, scores = tiny_models.batch(8, 3, start_token=tiny_models.PAD)
        with torch.no_grad():
            logits = [
                ours.model(input_ids=q[None], decoder_input_ids=r[None])[0][0] for q, r in zip(queries, responses)
            ]
        rows = [x[:-1].log_softmax(-1).gather(1, r[1:, None]).squeeze(1) for x, r in zip(logits, responses)]
        given = [torch.cat([torch.tensor([math.nan]), row]) for row in rows]  # there is none for the start token
    else:
        queries, responses, scores = batch(ours)
        given = (change or engine)(ours, queries, responses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = ours.step(queries, responses, scores, rollout_logprobs=given)
    assert stats["ppo/rollout/difference"] < 0.02
    assert change is not None or stats["ppo/rollout/difference"] < 1e-5


def test_only_one_warning_and_it_changes_no_bit():
    found = []
    for given in (True, False):
        ours = trainer()
        queries, responses, scores = batch(ours)
        rollout = engine(ours, queries, responses, hot(0.5)) if given else None
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                stats = ours.step(queries, responses, scores, rollout_logprobs=rollout)
        assert len([w for w in seen if "rollout_logprobs" in str(w.message)]) == given
        found.append((stats, weights(ours)))
    names = {f"ppo/rollout/{x}" for x in (*STAT_NAMES, "kl", "difference")}
    assert found[0][0].keys() - found[1][0].keys() == names and len(found[1][0]) == 40
    assert same(found[0][1], found[1][1])


def test_a_warning_that_is_an_error_changes_no_weight():
    ours = trainer()
    queries, responses, scores = batch(ours)
    before = weights(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="cause is a temperature"):
            ours.step(queries, responses, scores, rollout_logprobs=engine(ours, queries, responses, hot(0.5)))
    assert same(weights(ours), before)


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:PPOTrainer.step. rollout_logprobs differ")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "kind, level", [("tis", "token"), ("icepop", "token"), ("tis", "sequence"), ("tis", "geometric")]
)
def test_the_loss_is_weighted(kind, level, side, monkeypatch):
    low, high = 0.5, 1.5
    ours = trainer(
        rollout_kind=kind, rollout_level=level, rollout_low=low, rollout_high=high, padding_side=side, mini_batch_size=8
    )
    queries, responses, scores = batch(ours)
    masks = [torch.ones_like(ids) for ids in responses]
    for mask in masks[:3]:
        mask[1] = 0
    given = engine(ours, queries, responses, hot(0.8))
    own = engine(ours, queries, responses)
    seen, op = [], training.policy_and_value_loss
    monkeypatch.setattr(
        training, "policy_and_value_loss", lambda *args, **kw: seen.append((args[6], kw["weights"])) or op(*args, **kw)
    )
    hidden = [row.masked_fill(mask == 0, math.nan) for row, mask in zip(given, masks)]
    stats = ours.step(queries, responses, scores, masks, hidden)
    (mask, found) = seen[0]
    expected = []
    for a, b, counted in zip(own, given, masks, strict=True):
        weight, _ = reference.rollout_weights(
            a[None], b[None], counted[None], kind=kind, level=level, bounds=(low, high)
        )
        expected.append(weight[0][counted != 0])
    found = sorted(found[mask != 0].tolist())
    assert found == pytest.approx(sorted(torch.cat(expected).tolist()), rel=1e-4, abs=1e-6)
    assert stats["ppo/rollout/mean"] == pytest.approx(sum(found) / len(found), rel=1e-4)
    assert stats["ppo/policy/weights_mean"] == pytest.approx(stats["ppo/rollout/mean"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:PPOTrainer.step. rollout_logprobs differ")
def test_weights_change_the_policy_and_not_the_values():
    found = []
    for kind in (None, "icepop"):
        ours = trainer(rollout_kind=kind, critic_model=critic(), rollout_low=0.99, rollout_high=1.01)
        queries, responses, scores = batch(ours)
        torch.manual_seed(0)
        ours.step(queries, responses, scores, rollout_logprobs=engine(ours, queries, responses, hot(0.8)))
        found.append((weights(ours), state(ours.critic)))
    assert not same(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])


def critic():
    return ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2", 5))


@pytest.mark.filterwarnings("ignore:PPOTrainer.step. rollout_logprobs differ")
def test_with_logits_as_without():
    found = []
    for full in (False, True):
        ours = trainer(rollout_kind="tis")
        queries, responses, scores = batch(ours)
        if full:
            ours.model.register_forward_hook(lambda *_: None)
        ours.step(queries, responses, scores, rollout_logprobs=engine(ours, queries, responses, hot(0.8)))
        assert (ours.why_logits is None) != full
        found.append(weights(ours))
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=1e-5)


# ---- what is refused -------------------------------------------------------------------------------------------------


def at(row, value):
    def change(rows):
        rows[row] = rows[row].clone()
        rows[row][1] = value

    return change


def replaced(row, value):
    def change(rows):
        rows[row] = value

    return change


@pytest.mark.parametrize(
    "change, kind, text",
    [
        (at(2, math.nan), ValueError, r"rollout_logprobs\[2\]\[1\] must be finite and at most 0, .*got nan"),
        (at(2, -math.inf), ValueError, r"rollout_logprobs\[2\]\[1\] must be finite and at most 0, .*got -inf"),
        (at(2, 0.7), ValueError, r"rollout_logprobs\[2\]\[1\] must be finite and at most 0, .*got 0.69"),
        (
            replaced(1, torch.zeros(3)),
            ValueError,
            r"rollout_logprobs\[1\] must have the shape \[9\] of responses\[1\], got \[3\]",
        ),
        (replaced(1, torch.zeros(9, 1)), ValueError, r"rollout_logprobs\[1\] must have the shape"),
        (
            replaced(1, torch.zeros(9, dtype=torch.int64)),
            TypeError,
            r"rollout_logprobs\[1\] must hold floats, got torch.int64",
        ),
        (
            replaced(1, [0.0] * 9),
            TypeError,
            r"rollout_logprobs\[1\] must be a 1-D tensor of log-probabilities, got list",
        ),
        (lambda rows: rows.pop(), ValueError, "rollout_logprobs must have config.batch_size = 8 entries, got 7"),
    ],
)
def test_what_is_refused(change, kind, text):
    ours = trainer()
    queries, responses, scores = batch(ours)
    given = engine(ours, queries, responses)
    change(given)
    before = weights(ours)
    with pytest.raises(kind, match=f"^PPOTrainer.step: {text}"):
        ours.step(queries, responses, scores, rollout_logprobs=given)
    with pytest.raises(TypeError, match="rollout_logprobs must be a list"):
        ours.step(queries, responses, scores, rollout_logprobs=torch.zeros(8, 9))
    assert same(weights(ours), before)


def test_weights_that_nobody_would_use_are_refused():
    ours = trainer(rollout_kind="tis")
    queries, responses, scores = batch(ours)
    with pytest.raises(
        ValueError, match="rollout_logprobs must be given with PPOConfig.rollout_kind = 'tis', got None"
    ):
        ours.step(queries, responses, scores)
    ours.loss = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="PPOConfig.rollout_kind must be None where loss is replaced, got 'tis'"):
        ours.step(queries, responses, scores, rollout_logprobs=engine(ours, queries, responses))


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"rollout_kind": "is"}, "rollout_kind must be one of None, tis, icepop, got 'is'"),
        ({"rollout_level": None}, "rollout_level must be one of token, sequence, geometric, got None"),
        ({"rollout_low": -1.0}, "rollout_low must be finite and not negative, got -1.0"),
        ({"rollout_high": math.inf}, "rollout_high must be finite and not negative, got inf"),
        ({"rollout_low": 3.0}, "rollout_low must be at most rollout_high, got 3.0 and 2.0"),
    ],
)
def test_settings_out_of_range(settings, text):
    with pytest.raises(ValueError, match=text):
        ppo_ext.PPOConfig(**settings)
