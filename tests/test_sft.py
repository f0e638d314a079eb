"""Supervised fine-tuning: the loss is the model's own, training lowers it, bad input is named."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ppo_ext.supervised.sft import SFTConfig, SFTTrainer


def tiny_model(context=16):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=12, n_positions=context, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


class WordTokenizer:
    """A text's tokens are its digits."""

    eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": [int(c) for c in text]}


COUNTING = [[(i + j) % 10 + 1 for j in range(8)] for i in range(10)]


def test_loss_is_the_models_own_mean_over_tokens():
    model = tiny_model()
    samples = [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([6, 7]), torch.tensor([8, 9, 10])]
    trainer = SFTTrainer(model, SFTConfig(eval_batch_size=2), samples, samples)
    # transformers takes the mean per call; weighted by the predicted tokens these are one mean over all of them.
    nats = [model(input_ids=s[None], labels=s[None]).loss.item() * (len(s) - 1) for s in samples]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(nats) / 7, rel=1e-5)


def test_training_lowers_the_held_out_loss_and_repeats_exactly():
    losses = []
    for _ in range(2):
        model = tiny_model()
        config = SFTConfig(max_steps=60, batch_size=5, learning_rate=2e-2, seed=3)
        trainer = SFTTrainer(model, config, COUNTING[:8], COUNTING[8:])
        before = trainer.evaluate()["eval_loss"]
        losses.append(trainer.train(on_step=lambda record: None)["eval_loss"])
        assert losses[-1] < 0.5 * before
        assert not model.training
    assert losses[0] == losses[1]


def test_reports_every_step():
    records = []
    SFTTrainer(tiny_model(), SFTConfig(max_steps=3, batch_size=4), COUNTING).train(records.append)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert all(r["steps"] == 3 and r["loss"] > 0 and r["learning_rate"] > 0 for r in records)


def test_texts_end_with_eos_and_are_cut_to_the_context():
    trainer = SFTTrainer(tiny_model(context=6), SFTConfig(), ["123", "123456789"], tokenizer=WordTokenizer())
    assert [s.tolist() for s in trainer.train_dataset] == [[1, 2, 3, 0], [1, 2, 3, 4, 5, 6]]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = tiny_model()
    with torch.no_grad():
        model.transformer.wte.weight[7] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match="SFTTrainer: loss must be finite, got nan at step 1"):
        SFTTrainer(model, SFTConfig(max_steps=2), [[7, 7, 7]]).train(lambda record: None)
    assert all(torch.equal(p.nan_to_num(), before[name].nan_to_num()) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], r"SFTTrainer: train_dataset must hold at least one sequence, got none"),
        ([[1, 2], [3]], r"SFTTrainer: train_dataset\[1\] must be one row of at least 2 tokens, got shape \[1\]"),
        ([torch.ones(2, 2)], r"SFTTrainer: train_dataset\[0\] must be one row .* got shape \[2, 2\]"),
        (["12"], r"train_dataset must be token ids where no tokenizer is given, got the text '12'"),
    ],
)
def test_rejects_bad_datasets(dataset, message):
    with pytest.raises(ValueError, match=message):
        SFTTrainer(tiny_model(), SFTConfig(), dataset)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_steps", 0, "SFTConfig: max_steps must be > 0, got 0"),
        ("batch_size", -1, "SFTConfig: batch_size must be > 0, got -1"),
        ("learning_rate", float("nan"), "SFTConfig: learning_rate must be > 0, got nan"),
        ("warmup_ratio", 1.0, r"SFTConfig: warmup_ratio must be in \[0, 1\), got 1.0"),
        ("max_length", 1, "SFTConfig: max_length must be >= 2 or None, got 1"),
    ],
)
def test_rejects_bad_settings(field, value, message):
    with pytest.raises(ValueError, match=message):
        SFTConfig(**{field: value})


def test_evaluate_needs_held_out_data():
    with pytest.raises(ValueError, match="eval_dataset must be given at construction, got None"):
        SFTTrainer(tiny_model(), SFTConfig(), COUNTING).evaluate()
