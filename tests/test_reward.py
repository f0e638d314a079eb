"""Reward models: TRL's loss, margins pair by pair, scores that padding does not touch, normalisation that is kept."""

import types
import warnings

import pytest
import tiny_models
import torch
from conftest import require_trl
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import ppo_ext.trl
from ppo_ext import RewardConfig, RewardTrainer, normalize_rewards, reward_loss, reward_scores
from ppo_ext.trl.trainer.utils import RewardDataCollatorWithPadding, compute_accuracy

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


def pairs(chosen=CHOSEN, rejected=REJECTED, margins=None):
    """With TRL 0.11's columns."""
    rows = [
        {
            "input_ids_chosen": list(c),
            "attention_mask_chosen": [1] * len(c),
            "input_ids_rejected": list(r),
            "attention_mask_rejected": [1] * len(r),
        }
        for c, r in zip(chosen, rejected, strict=True)
    ]
    return [row | {"margin": m} for row, m in zip(rows, margins, strict=True)] if margins else rows


@pytest.fixture
def config(tmp_path):
    def make(**fields):
        defaults = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        return RewardConfig(**{"output_dir": str(tmp_path / "out"), **defaults, **fields})

    return make


def evaluated(model, config, dataset):
    metrics = RewardTrainer(model, config, eval_dataset=dataset).evaluate()
    return {name: metrics[f"eval_{name}"] for name in ("loss", "accuracy", "ties", "margin")}


def their_loss(trl, model, inputs, coefficient, return_outputs=False):
    their_self = types.SimpleNamespace(
        use_reward_data_collator=True, args=types.SimpleNamespace(center_rewards_coefficient=coefficient)
    )
    return trl.RewardTrainer.compute_loss(their_self, model, inputs, return_outputs)


@pytest.mark.parametrize("coefficient", [None, 0.01, 0.5])
@pytest.mark.parametrize("margin", [None, 0.7])  # one margin for all pairs: there TRL's [B, B] loss has the right mean
def test_loss_matches_trl(config, coefficient, margin):
    trl = require_trl()
    model = tiny_model()
    dataset = pairs(CHOSEN, [r[:3] for r in REJECTED], margin and [margin] * 4)  # of two widths in TRL's batches
    their_collator = trl.trainer.utils.RewardDataCollatorWithPadding(tiny_models.tokenizer())
    their_collator.tokenizer.pad_token_id = PAD
    ours = RewardTrainer(model, config(center_rewards_coefficient=coefficient), train_dataset=dataset)
    for batch in (their_collator(dataset), ours.data_collator(dataset)):
        theirs, outputs = their_loss(trl, model, batch, coefficient, return_outputs=True)
        loss, our_outputs = ours.compute_loss(model, batch, return_outputs=True)
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
        assert list(our_outputs) == list(outputs)
        for name, rewards in outputs.items():
            torch.testing.assert_close(our_outputs[name], rewards, rtol=1e-5, atol=1e-6)


def test_batches_match_trls(config):
    """But both sides have one width here, and a collator pads by lengths, not by the padding id."""
    trl = require_trl()
    tokenizer = tiny_models.tokenizer()
    dataset = pairs(margins=[0.5, 1.0, 1.5, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = trl.trainer.utils.RewardDataCollatorWithPadding(tokenizer, pad_to_multiple_of=3)(dataset)
    ours = RewardDataCollatorWithPadding(tokenizer, pad_to_multiple_of=3)(dataset)
    assert {name: torch.as_tensor(value).tolist() for name, value in ours.items()} == {
        name: torch.as_tensor(value).tolist() for name, value in theirs.items()
    }
    assert RewardDataCollatorWithPadding(tokenizer)(dataset[2:])["input_ids_rejected"].shape == (2, 3)
    wide = RewardDataCollatorWithPadding(tokenizer, padding="max_length", max_length=9)(dataset)
    assert wide["attention_mask_chosen"].shape == (4, 9)


def test_a_padding_id_inside_a_sample_is_a_token():
    batch = RewardDataCollatorWithPadding(tiny_model().config)(pairs([[1, PAD, PAD]], [[PAD, 2, 3, 4]]))
    assert batch["attention_mask_chosen"].tolist() == [[1, 1, 1, 0]]
    assert batch["attention_mask_rejected"].tolist() == [[1, 1, 1, 1]]


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


def test_margins_follow_their_pairs_through_training(config):
    """With a margin per pair, one epoch in shuffled batches of one sees each pair with its own margin."""
    model = tiny_model()
    dataset = pairs(margins=[0.0, 1.0, 2.0, 3.0])
    arguments = config(per_device_train_batch_size=1, learning_rate=1e-12, num_train_epochs=1, logging_steps=1)
    trainer = RewardTrainer(model, arguments, train_dataset=dataset)
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    rewards = reward_scores(model, CHOSEN) - reward_scores(model, REJECTED)
    assert sorted(losses) == pytest.approx(sorted((-logsigmoid(rewards - torch.arange(4))).tolist()), abs=1e-3)


def test_learns_a_preference_and_repeats_exactly(config):
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, 9, (80, 6), generator=generator)
    chosen, rejected = sequences.clone(), sequences.clone()
    chosen[:, 4], rejected[:, 2] = 9, 10
    dataset = pairs(chosen.tolist(), rejected.tolist())
    results = []
    for _ in range(2):
        model = tiny_model()
        arguments = config(num_train_epochs=6, per_device_train_batch_size=16, learning_rate=1e-2)
        RewardTrainer(model, arguments, train_dataset=dataset[:60]).train()
        results.append(evaluated(model, config(), dataset[60:]))
    assert results[0]["accuracy"] == 1.0
    assert results[0]["margin"] > 1
    assert results[0] == results[1]


def test_ties_are_told_and_count_as_wrong(config):
    model = tiny_model()
    torch.nn.init.zeros_(model.score.weight)
    expected = {"loss": pytest.approx(0.693147, rel=1e-5), "accuracy": 0.0, "ties": 1.0, "margin": 0.0}
    assert evaluated(model, config(), pairs()) == expected


def test_metrics_by_hand():
    rewards = torch.tensor([[2.0, 1.0], [0.5, 0.5], [1.0, 3.0], [1.5, 1.0]]).numpy()
    assert compute_accuracy((rewards, None)) == {"accuracy": 0.5, "ties": 0.25, "margin": -0.125}


def test_own_metrics_get_the_rewards(config):
    model = tiny_model()
    seen = {}

    def metrics(result):
        rewards, labels = result
        seen.update(rewards=torch.from_numpy(rewards), labels=labels.tolist())
        return {"right": float((rewards.argmax(1) == labels).mean())}  # as TRL's own function does

    arguments = config(per_device_eval_batch_size=3)
    assert "eval_right" in RewardTrainer(model, arguments, eval_dataset=pairs(), compute_metrics=metrics).evaluate()
    expected = torch.stack([reward_scores(model, CHOSEN), reward_scores(model, REJECTED)], dim=1)
    torch.testing.assert_close(seen["rewards"], expected, rtol=1e-5, atol=1e-6)
    assert seen["labels"] == [0.0] * 4


def test_texts_and_token_ids_give_the_same_batches(config):
    datasets = pytest.importorskip("datasets")
    tokenizer = tiny_models.tokenizer()
    tokens = pairs([[3, 4, 5, 6], [7, 8]], [[9], [10, 11, 9]], [0.5, 1.0])
    texts = [
        {"chosen": "w3 w4 w5 w6", "rejected": "w9", "margin": 0.5},
        {"chosen": "w7 w8", "rejected": "w10 w11 w9", "margin": 1.0},
    ]
    model = tiny_model()
    batches = []
    for dataset in (tokens, texts, datasets.Dataset.from_list(tokens), datasets.Dataset.from_list(texts)):
        trainer = RewardTrainer(model, config(max_length=3), eval_dataset=dataset, processing_class=tokenizer)
        (batch,) = trainer.get_eval_dataloader()
        batches.append({name: torch.as_tensor(value).tolist() for name, value in batch.items()})
    assert batches[0]["input_ids_chosen"] == [[3, 4, 5], [7, 8, PAD]]
    assert batches[0]["attention_mask_rejected"] == [[1, 0, 0], [1, 1, 1]]
    assert batches[0]["margin"] == [0.5, 1.0]
    assert all(batch == batches[0] for batch in batches)


def test_a_data_collator_gets_the_examples_as_they_are(config):
    def collate(numbers):
        return RewardDataCollatorWithPadding(tiny_model().config)([pairs()[i] for i in numbers])

    trainer = RewardTrainer(tiny_model(), config(), collate, eval_dataset=[0, 1, 2, 3])
    expected = evaluated(tiny_model(), config(), pairs())["loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_script_for_trl_runs(tmp_path):
    """As in the examples of TRL 0.11: a mapped dataset, a config of training arguments, evaluation, saving."""
    datasets = pytest.importorskip("datasets")
    tokenizer = tiny_models.tokenizer()
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=tiny_models.VOCAB, n_positions=48, n_embd=16, n_layer=1, n_head=2, num_labels=1)
    )
    model.config.pad_token_id = tokenizer.pad_token_id

    def preprocess_function(examples):
        new_examples = {}
        for side in ("chosen", "rejected"):
            tokenized = [tokenizer(text) for text in examples[side]]
            new_examples[f"input_ids_{side}"] = [t["input_ids"] for t in tokenized]
            new_examples[f"attention_mask_{side}"] = [t["attention_mask"] for t in tokenized]
        return new_examples

    raw = datasets.Dataset.from_dict(
        {"chosen": [f"w{3 + i} w20 w{4 + i}" for i in range(12)], "rejected": [f"w{3 + i} w21" for i in range(12)]}
    )
    dataset = raw.map(preprocess_function, batched=True, num_proc=None)
    dataset = dataset.filter(lambda x: len(x["input_ids_chosen"]) <= 8 and len(x["input_ids_rejected"]) <= 8)
    training_args = ppo_ext.trl.RewardConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, per_device_eval_batch_size=4, num_train_epochs=8,
        gradient_accumulation_steps=2, learning_rate=5e-3, remove_unused_columns=False, max_length=8, report_to="none",
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="accuracy",
        use_cpu=True, logging_steps=1, center_rewards_coefficient=0.01,
    )  # fmt: skip
    trainer = ppo_ext.trl.RewardTrainer(
        model=model, tokenizer=tokenizer, args=training_args, train_dataset=dataset, eval_dataset=dataset
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_model(training_args.output_dir)
    assert metrics["eval_accuracy"] == 1.0
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (reward_scores(loaded, [[3, 20, 4]]) > reward_scores(loaded, [[3, 21]])).all()
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_padding_does_not_change_scores(kind):
    model = tiny_model(kind)
    together = reward_scores(model, CHOSEN + REJECTED)
    alone = torch.cat([reward_scores(model, [s]) for s in CHOSEN + REJECTED])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert together.shape == (8,)
    assert together.dtype == torch.float32


def test_normalisation_survives_saving(tmp_path):
    model = tiny_model()
    raw = reward_scores(model, CHOSEN + REJECTED)
    normalize_rewards(model, CHOSEN + REJECTED)
    scores = reward_scores(model, CHOSEN + REJECTED)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(scores.argsort(), raw.argsort())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(reward_scores(loaded, CHOSEN + REJECTED), scores)


def test_normalising_twice_is_normalising_once():
    model = tiny_model()
    once = normalize_rewards(model, CHOSEN)
    assert normalize_rewards(model, CHOSEN) == once


def test_training_can_go_on_with_a_normalised_model(config):
    """Gain and bias belong to `reward_scores`; the loss is that of the raw rewards."""
    model = tiny_model()
    before = evaluated(model, config(), pairs())
    normalize_rewards(model, CHOSEN)
    assert evaluated(model, config(), pairs()) == before


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(training):
    model = tiny_model().train(training)
    reward_scores(model, CHOSEN)
    assert model.training is training


def trained_on(dataset, **arguments):
    return RewardTrainer(tiny_model(), None, train_dataset=dataset, **arguments)


def batch_of_mixed_margins():
    return RewardDataCollatorWithPadding(tiny_model().config)([*pairs(), *pairs(margins=[1.0] * 4)])


def language_model(num_labels=1):
    return GPT2LMHeadModel(tiny_model(num_labels=num_labels).config)


class ScorePerToken(torch.nn.Module):
    """A reward model of somebody's own that gives every token a score."""

    def __init__(self):
        super().__init__()
        self.config = tiny_model().config
        self.head = torch.nn.Embedding(12, 1)

    def forward(self, input_ids, attention_mask, return_dict=True):
        return types.SimpleNamespace(logits=self.head(input_ids))


def collated(chosen, rejected=REJECTED):
    """A trainer's loss of a batch that a data_collator of the user's own has made."""
    batch = RewardDataCollatorWithPadding(tiny_model().config)(pairs(chosen, rejected))
    return RewardTrainer(tiny_model(), None, lambda rows: batch, train_dataset=[0]).compute_loss(tiny_model(), batch)


LONG = [list(range(17)), *CHOSEN[1:]]
LONG[0] = [i % 11 for i in LONG[0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reward_scores(tiny_model("gpt2"), LONG),
         r"reward_scores: sequences\[0\] must hold at most 16 tokens, as many as the model reads, got 17; cut it"),
        (lambda: reward_scores(tiny_model("bert"), LONG),
         r"reward_scores: sequences\[0\] must hold at most 16 tokens, as many as the model reads, got 17; cut it"),
        (lambda: normalize_rewards(tiny_model("bert"), LONG), r"sequences\[0\] must hold at most 16 tokens"),
        (lambda: trained_on(pairs(LONG)),
         r"train_dataset\[0\]: chosen must hold at most 16 tokens, as many as the model reads, got 17; set max_length"),
        (lambda: collated(LONG), "RewardTrainer: input_ids must hold at most 16 tokens, as many as the model reads, got 17"),
        (lambda: reward_scores(tiny_model(), [[1, 2], [3, 12]]),
         r"reward_scores: sequences\[1\] must hold token ids in the vocabulary \[0, 12\), got 12"),
        (lambda: reward_scores(tiny_model("bert"), [[-1]]), r"sequences\[0\] must hold token ids in .*, got -1"),
        (lambda: trained_on(pairs(CHOSEN, [*REJECTED[:3], [99]])),
         r"train_dataset\[3\]: rejected must hold token ids in the vocabulary \[0, 12\), got 99"),
        (lambda: collated([*CHOSEN[:3], [12]]), "RewardTrainer: input_ids must hold token ids in the vocabulary"),
        (lambda: reward_scores(tiny_model(pad_token_id=12), CHOSEN),
         r"model.config.pad_token_id must lie in the vocabulary \[0, 12\), got 12; call model.resize_token_embeddings"),
        (lambda: reward_scores(language_model(), CHOSEN),
         r"reward_scores: model must be a sequence classifier, got the language model GPT2LMHeadModel; load it with Auto"),
        (lambda: RewardTrainer(language_model(num_labels=2), None, train_dataset=pairs()),
         r"RewardTrainer: model must be a sequence classifier, got the language model GPT2LMHeadModel; load it with Auto"),
        (lambda: RewardTrainer(None, None, model_init=lambda: language_model()), "must be a sequence classifier, got"),
        (lambda: reward_scores(ScorePerToken(), CHOSEN),
         r"reward_scores: model must give one score per sequence, logits \[4, 1\], got \[4, 4, 1\]"),
        (lambda: RewardTrainer(ScorePerToken(), None).compute_loss(ScorePerToken(),
         RewardDataCollatorWithPadding(tiny_model().config)(pairs())), r"RewardTrainer: model must give one score per seq"),
        (lambda: trained_on([]), "RewardTrainer: train_dataset must hold at least one example, got none"),
        (lambda: trained_on(pairs([[1]], [[]])),
         r"RewardTrainer: train_dataset\[0\]: rejected must be one row of at least 1 tokens, got shape \[0\]"),
        (lambda: trained_on([{"input_ids_chosen": [1]}]),
         r"\[0\] must hold input_ids_rejected or the text rejected, got the columns \['input_ids_chosen'\]"),
        (lambda: trained_on([{"chosen": "ok", "rejected": "bad"}]),
         r"\[0\]: chosen must be token ids where no tokenizer is given, got the text 'ok'"),
        (lambda: trained_on([pairs()[0] | {"attention_mask_chosen": [1]}]),
         "attention_mask_chosen must have 4 entries as input_ids_chosen, got 1"),
        (lambda: trained_on(pairs(margins=[0, 0, 0, float("nan")])),
         r"train_dataset\[3\]: margin must be one finite number, got nan"),
        (lambda: trained_on(pairs(margins=[[0, 0]] * 4)), r"\[0\]: margin must be one finite number, got \[0, 0\]"),
        (batch_of_mixed_margins, "RewardTrainer: margin must be given for all pairs or for none, got 4 of 8"),
        (lambda: reward_scores(tiny_model(), []), "reward_scores: sequences must hold at least one sequence, got none"),
        (lambda: reward_scores(tiny_model(), [[1], []]), r"reward_scores: sequences\[1\] must be one row of at least 1"),
        (lambda: reward_scores(tiny_model(), ["ok"]), r"reward_scores: sequences\[0\] must be token ids where no token"),
        (lambda: normalize_rewards(tiny_model(), [[1]]), "sequences must be at least 2 with different rewards, got 1"),
        (lambda: normalize_rewards(tiny_model(), [[1], [1]]), "at least 2 with different rewards, got 2 with sd 0.0"),
        (lambda: reward_loss(torch.ones(2), torch.ones(3)), r"rejected_rewards must .* got shape \[3\]"),
        (lambda: reward_loss(torch.ones(0), torch.ones(0)), r"one value per pair, \[0\] or \[0, 1\] with 0 > 0"),
        (lambda: reward_loss(torch.ones(2), torch.ones(2), torch.ones(2, 2)), r"margin must .* got shape \[2, 2\]"),
        (lambda: RewardTrainer(tiny_model(num_labels=2)), "RewardTrainer: model must have num_labels 1, got 2"),
        (lambda: reward_scores(tiny_model(num_labels=3), CHOSEN), "reward_scores: model must have num_labels 1, got 3"),
        (lambda: RewardTrainer(tiny_model(pad_token_id=None)), "model.config.pad_token_id must be set, got None"),
        (lambda: RewardConfig(output_dir="x", max_length=0), "RewardConfig: max_length must be >= 1 or None, got 0"),
        (lambda: RewardConfig(output_dir="x", label_smoothing_factor=0.1), "label_smoothing_factor must be 0.0, got 0.1"),
        (lambda: RewardConfig(output_dir="x", center_rewards_coefficient=-1),
         "center_rewards_coefficient must be >= 0 .* got -1"),
    ],
)  # fmt: skip
def test_rejects(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without a config the trainer makes ./tmp_trainer, as TRL's does
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("sequence", "kind", "text"),
    [
        (
            torch.ones(3, dtype=torch.long, device="meta"),
            TypeError,
            "be a dense tensor with values, got one on the meta",
        ),
        (torch.ones(3, dtype=torch.long).to_sparse(), TypeError, "be a dense tensor, got torch.sparse_coo"),
        (torch.nested.as_nested_tensor([torch.ones(3)]), TypeError, "be a dense tensor, got a nested one"),
        ([1.5, 2.0], TypeError, "hold integer token ids, got torch.float32"),
        ([True, False], TypeError, "hold integer token ids, got torch.bool"),
        ([1, None], ValueError, "be one row of token ids, got list: "),
        ([[1], [2, 3]], ValueError, "be one row of token ids, got list: "),
        ([2**70], ValueError, "be one row of token ids, got list: "),
    ],
    ids=str,
)
def test_what_is_no_row_of_ids_is_one_sentence(sequence, kind, text):
    with pytest.raises(kind, match=rf"^reward_scores: sequences\[1\] must {text}"):
        reward_scores(tiny_model(), [[1, 2], sequence])


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("before", [{}, {"reward_gain": 2.0, "reward_bias": -1.0}, {"reward_bias": 3.0}])
@pytest.mark.parametrize(
    ("sequences", "error"), [([[1], [1]], ValueError), ([[1], []], ValueError), (CHOSEN, KeyboardInterrupt)]
)
def test_an_error_leaves_gain_bias_and_modes(before, sequences, error):
    model = tiny_model().train()
    model.transformer.drop.eval()
    model.config.update(before)
    modes = [module.training for module in model.modules()]
    if error is KeyboardInterrupt:
        model.transformer.h[0].register_forward_hook(interrupt)
    with pytest.raises(error):
        normalize_rewards(model, sequences)
    assert {name: value for name, value in vars(model.config).items() if name.startswith("reward_")} == before
    assert [module.training for module in model.modules()] == modes


def test_a_model_reads_as_far_as_its_positions_go(config):
    """Rotary positions have no end, whatever max_position_embeddings says; max_length cuts what is longer than a table."""
    llama = tiny_model("llama")
    llama.config.max_position_embeddings = 4
    assert torch.isfinite(reward_scores(llama, LONG)).all()
    assert RewardTrainer(llama, config(), train_dataset=pairs(LONG)).train_dataset
    assert RewardTrainer(tiny_model(), config(max_length=16), train_dataset=pairs(LONG)).train_dataset


def test_a_score_that_is_not_finite_is_named():
    model = tiny_model()
    with torch.no_grad():
        model.transformer.wte.weight[8] = float("inf")
    with pytest.raises(ValueError, match=r"reward_scores: sequences\[2\] must get a finite score, got nan"):
        reward_scores(model, CHOSEN)
