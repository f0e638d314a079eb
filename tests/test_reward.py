"""Reward models: TRL's loss, margins pair by pair, scores that padding does not touch, normalisation that is kept."""

import types

import pytest
import torch
from conftest import require_trl
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from ppo_ext.supervised.reward_model import RewardConfig, RewardTrainer, normalize_rewards, reward_loss, score
from ppo_ext.supervised.sequences import right_pad

PAD = 11


def tiny_model(kind="gpt2", num_labels=1, pad_token_id=PAD):
    torch.manual_seed(0)
    common = {"vocab_size": 12, "num_labels": num_labels, "pad_token_id": pad_token_id}
    if kind == "bert":
        config = BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common,
        )  # fmt: skip
        return BertForSequenceClassification(config).eval()
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, bos_token_id=0,
            eos_token_id=0, **common,
        )  # fmt: skip
        return LlamaForSequenceClassification(config).eval()
    common |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **common)
    return GPT2ForSequenceClassification(config).eval()


CHOSEN = [[1, 2, 3, 4], [5, 6], [7, 8, 9], [2, 2]]
REJECTED = [[1, 2, 4], [6, 5, 4, 3], [9], [3, 3, 3]]


@pytest.mark.parametrize("coefficient", [None, 0.01, 0.5])
def test_matches_trl_without_margin(coefficient):
    trl = require_trl()
    model = tiny_model()
    inputs = {}
    for name, sequences in (("chosen", CHOSEN), ("rejected", REJECTED)):
        ids, mask = right_pad([torch.tensor(s) for s in sequences], PAD)
        inputs |= {f"input_ids_{name}": ids, f"attention_mask_{name}": mask}
    their_self = types.SimpleNamespace(
        use_reward_data_collator=True, args=types.SimpleNamespace(center_rewards_coefficient=coefficient)
    )
    theirs = trl.RewardTrainer.compute_loss(their_self, model, inputs)
    ours = RewardTrainer(model, RewardConfig(center_rewards_coefficient=coefficient)).evaluate(CHOSEN, REJECTED)
    assert ours["loss"] == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_margin_counts_pair_by_pair(shape):
    chosen, rejected = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([1.0, 1.0, -3.0])
    margin = torch.tensor([0.0, 1.0, 5.0])
    by_hand = -sum(logsigmoid(c - r - m) for c, r, m in zip(chosen, rejected, margin, strict=True)) / 3
    ours = reward_loss(chosen.view(shape), rejected.view(shape), margin)
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-6)
    # What TRL 0.11.4 computes for [B, 1] rewards and a [B] margin is the mean over all 9 combinations.
    broadcast = -logsigmoid(chosen[:, None] - rejected[:, None] - margin).mean()
    assert ours.item() != pytest.approx(broadcast.item(), rel=1e-2)


def test_margins_follow_their_pairs_through_training():
    """With a margin per pair, one epoch in shuffled batches of one sees each pair with its own margin."""
    model = tiny_model()
    losses = []
    config = RewardConfig(batch_size=1, learning_rate=1e-12)
    RewardTrainer(model, config).train(CHOSEN, REJECTED, [0.0, 1.0, 2.0, 3.0], lambda r: losses.append(r["loss"]))
    rewards = score(model, CHOSEN) - score(model, REJECTED)
    assert sorted(losses) == pytest.approx(sorted((-logsigmoid(rewards - torch.arange(4))).tolist()), abs=1e-3)


def test_learns_a_preference_and_repeats_exactly():
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, 9, (80, 6), generator=generator)
    chosen, rejected = sequences.clone(), sequences.clone()
    chosen[:, 4], rejected[:, 2] = 9, 10
    results = []
    for _ in range(2):
        model = tiny_model()
        trainer = RewardTrainer(model, RewardConfig(num_train_epochs=6, batch_size=16, learning_rate=1e-2))
        trainer.train(list(chosen[:60]), list(rejected[:60]), on_step=lambda record: None)
        results.append(trainer.evaluate(list(chosen[60:]), list(rejected[60:])))
        assert not model.training
    assert results[0]["accuracy"] == 1.0
    assert results[0]["margin"] > 1
    assert results[0] == results[1]


def test_ties_are_told_and_count_as_wrong():
    model = tiny_model()
    torch.nn.init.zeros_(model.score.weight)
    assert RewardTrainer(model).evaluate(CHOSEN, REJECTED) == {
        "loss": pytest.approx(0.693147, rel=1e-5),
        "accuracy": 0.0,
        "ties": 1.0,
        "margin": 0.0,
    }


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_padding_does_not_change_scores(kind):
    model = tiny_model(kind)
    together = score(model, CHOSEN + REJECTED)
    alone = torch.cat([score(model, [s]) for s in CHOSEN + REJECTED])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert together.shape == (8,)
    assert together.dtype == torch.float32


def test_normalisation_survives_saving(tmp_path):
    model = tiny_model()
    raw = score(model, CHOSEN + REJECTED)
    normalize_rewards(model, CHOSEN + REJECTED)
    scores = score(model, CHOSEN + REJECTED)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(scores.argsort(), raw.argsort())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(score(loaded, CHOSEN + REJECTED), scores)


def test_normalising_twice_is_normalising_once():
    model = tiny_model()
    once = normalize_rewards(model, CHOSEN)
    assert normalize_rewards(model, CHOSEN) == once


def test_training_can_go_on_with_a_normalised_model():
    """Gain and bias belong to `score`; the loss goes by the raw rewards."""
    model = tiny_model()
    before = RewardTrainer(model).evaluate(CHOSEN, REJECTED)
    normalize_rewards(model, CHOSEN)
    assert RewardTrainer(model).evaluate(CHOSEN, REJECTED) == before


def test_mode_is_restored():
    model = tiny_model().train()
    score(model, CHOSEN)
    RewardTrainer(model).evaluate(CHOSEN, REJECTED)
    assert model.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.train(CHOSEN, REJECTED[:3]), "train: chosen and rejected must be equally long .* got 4 and 3"),
        (lambda t: t.evaluate([], []), "evaluate: chosen and rejected must be equally long and not empty, got 0 and 0"),
        (lambda t: t.train(CHOSEN, REJECTED, [1.0]), r"train: margin must be 4 finite numbers, .* got shape \[1\]"),
        (lambda t: t.train(CHOSEN, REJECTED, [0, 0, 0, float("nan")]), "margin must be 4 finite numbers"),
        (lambda t: t.train([[]], [[1]]), r"train: chosen\[0\] must be one row of at least 1 tokens, got shape \[0\]"),
        (lambda t: t.train(["ok"], ["bad"]), "chosen must be token ids where no tokenizer is given, got the text 'ok'"),
        (lambda t: score(t.model, []), "score: sequences must hold at least one sequence, got none"),
        (lambda t: normalize_rewards(t.model, [[1]]), "sequences must be at least 2 with different rewards, got 1"),
        (lambda t: normalize_rewards(t.model, [[1], [1]]), "at least 2 with different rewards, got 2 with sd 0.0"),
        (lambda t: reward_loss(torch.ones(2), torch.ones(3)), r"rejected_rewards must .* got shape \[3\]"),
        (lambda t: reward_loss(torch.ones(0), torch.ones(0)), r"one value per pair, \[0\] or \[0, 1\] with 0 > 0"),
        (lambda t: reward_loss(torch.ones(2), torch.ones(2), torch.ones(2, 2)), r"margin must .* got shape \[2, 2\]"),
        (lambda t: RewardTrainer(tiny_model(num_labels=2)), "RewardTrainer: model must have num_labels 1, got 2"),
        (lambda t: score(tiny_model(num_labels=3), CHOSEN), "score: model must have num_labels 1, got 3"),
        (lambda t: RewardTrainer(tiny_model(pad_token_id=None)), "model.config.pad_token_id must be set, got None"),
        (lambda t: RewardConfig(batch_size=0), "RewardConfig: batch_size must be > 0, got 0"),
        (lambda t: RewardConfig(num_train_epochs=0), "RewardConfig: num_train_epochs must be > 0, got 0"),
        (lambda t: RewardConfig(center_rewards_coefficient=-1), "center_rewards_coefficient must be >= 0 .* got -1"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call(RewardTrainer(tiny_model()))


def test_a_loss_that_is_not_finite_stops_training():
    model = tiny_model()
    torch.nn.init.constant_(model.score.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="RewardTrainer: loss must be finite, got nan at step 1"):
        RewardTrainer(model).train(CHOSEN, REJECTED, on_step=lambda record: None)


def test_a_score_that_is_not_finite_is_named():
    model = tiny_model()
    with torch.no_grad():
        model.transformer.wte.weight[8] = float("inf")
    with pytest.raises(ValueError, match=r"score: sequences\[2\] must get a finite score, got nan"):
        score(model, CHOSEN)
