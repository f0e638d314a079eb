"""SFTTrainer: the loss is the model's own, texts are read as TRL reads them, bad input is named."""

import pytest
import tiny_models
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, GPT2LMHeadModel, TrainingArguments

from ppo_ext import SFTConfig, SFTTrainer
from ppo_ext.supervised.sft import pad_samples

EOS = tiny_models.EOS
COUNTING = [{"input_ids": [(i + j) % 10 + 3 for j in range(8)]} for i in range(10)]
RAGGED = [{"input_ids": ids} for ids in ([3, 4, 5, 6, 7], [8, 9], [10, 11, 12])]


def tiny_model(context=48):
    return tiny_models.build("gpt2", scale=1.0, n_positions=context, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)


@pytest.fixture
def config(tmp_path):
    def make(**fields):
        defaults = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        return SFTConfig(**{"output_dir": str(tmp_path / "out"), **defaults, **fields})

    return make


def trained_on(trainer):
    return [list(example["input_ids"]) for example in trainer.train_dataset]


def test_evaluation_is_the_models_own_mean_over_tokens(config):
    """Over all tokens, whatever the batches: transformers takes the mean of the means of batches."""
    model = tiny_model()
    rows = [torch.tensor([example["input_ids"]]) for example in RAGGED]
    nats = [model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1) for row in rows]
    for size in (1, 2, 3):
        trainer = SFTTrainer(model, config(per_device_eval_batch_size=size), eval_dataset=RAGGED)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(nats) / 7, rel=1e-5)


def test_the_loss_of_a_batch_is_that_of_transformers_collator_and_model(config):
    """TRL leaves the loss to the model and the batch to this collator."""
    tokenizer = tiny_models.tokenizer()
    model = tiny_model()
    theirs = DataCollatorForLanguageModeling(tokenizer, mlm=False)([dict(example) for example in RAGGED])
    ours = pad_samples(RAGGED)
    assert {name: tensor.tolist() for name, tensor in ours.items()} == {
        name: tensor.tolist() for name, tensor in theirs.items()
    }
    expected = model(**theirs).loss.item()
    assert SFTTrainer(model, config()).compute_loss(model, dict(theirs)).item() == pytest.approx(expected, rel=1e-5)


def test_a_padding_id_inside_a_sample_is_a_token():
    pad = tiny_models.PAD
    batch = pad_samples([{"input_ids": [3, pad, pad]}, {"input_ids": [4, 5, 6, 7]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[3, pad, pad, -100], [4, 5, 6, 7]]


def test_labels_and_masks_say_what_counts(config):
    model = tiny_model()
    row = torch.tensor([[3, 4, 5, 6, 7]])
    logprobs = model(row).logits.log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])[:, 0]
    prompt_left_out = {"input_ids": [3, 4, 5, 6, 7], "labels": [-100, -100, -100, 6, 7]}
    padded = {"input_ids": [3, 4, 5, 6, 7], "attention_mask": [1, 1, 1, 0, 0]}
    for example, counted in ((prompt_left_out, logprobs[2:]), (padded, logprobs[:2])):
        loss = SFTTrainer(model, config(), eval_dataset=[example]).evaluate()["eval_loss"]
        assert loss == pytest.approx(-counted.mean().item(), rel=1e-5)


def test_training_lowers_the_held_out_loss_and_repeats_exactly(config):
    losses = []
    for _ in range(2):
        arguments = config(max_steps=60, per_device_train_batch_size=5, learning_rate=2e-2, seed=3)
        trainer = SFTTrainer(tiny_model(), arguments, train_dataset=COUNTING[:8], eval_dataset=COUNTING[8:])
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        assert losses[-1] < 0.5 * before
    assert losses[0] == losses[1]


TEXTS = [{"text": "w3 w4 w5", "by": "w9"}, {"text": "w6 w7 w8 w9 w10 w11 w12", "by": "w8"}]


def test_texts_are_tokenized_and_cut(config):
    tokenizer = tiny_models.tokenizer()

    def formatted(examples):
        return [f"{by} {text}" for by, text in zip(examples["by"], examples["text"], strict=True)]

    def tokens(**arguments):
        return trained_on(SFTTrainer(tiny_model(context=6), config(), train_dataset=TEXTS, **arguments))

    by_field = [[3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert tokens(tokenizer=tokenizer, dataset_text_field="text") == by_field
    assert tokens(processing_class=tokenizer, dataset_text_field="text") == by_field
    assert tokens(tokenizer=tokenizer, dataset_text_field="text", max_seq_length=4) == [[3, 4, 5], [6, 7, 8, 9]]
    assert tokens(tokenizer=tokenizer, formatting_func=formatted) == [[9, 3, 4, 5], [8, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_are_the_tokenizers(config, special):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_models.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    arguments = config(dataset_text_field="text", max_seq_length=5, dataset_kwargs={"add_special_tokens": special})
    trainer = SFTTrainer(tiny_model(), arguments, train_dataset=TEXTS, tokenizer=tokenizer)
    expected = [[3, 4, 5, EOS], [6, 7, 8, 9, EOS]] if special else [[3, 4, 5], [6, 7, 8, 9, 10]]
    assert trained_on(trainer) == expected


def test_token_ids_are_cut_to_the_context(config):
    trainer = SFTTrainer(tiny_model(context=6), config(), train_dataset=[*COUNTING[:1], {"input_ids": [3, 4]}])
    assert trained_on(trainer) == [COUNTING[0]["input_ids"][:6], [3, 4]]


class Texts(Dataset):
    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, index):
        return TEXTS[index]


def test_every_kind_of_dataset_gives_the_same_batches(config):
    datasets = pytest.importorskip("datasets")
    batches = []
    table = datasets.Dataset.from_list(TEXTS)
    for dataset in (TEXTS, Texts(), table, table.with_format("torch"), table.to_iterable_dataset()):
        arguments = config(dataset_text_field="text", max_steps=1, per_device_eval_batch_size=2)
        trainer = SFTTrainer(tiny_model(), arguments, eval_dataset=dataset, tokenizer=tiny_models.tokenizer())
        (batch,) = trainer.get_eval_dataloader()
        batches.append({name: tensor.tolist() for name, tensor in batch.items()})
    assert batches[0]["input_ids"] == [[3, 4, 5, 0, 0, 0, 0], [6, 7, 8, 9, 10, 11, 12]]
    assert all(batch == batches[0] for batch in batches)


def test_a_dict_of_evaluation_sets(config):
    parts = {"short": RAGGED[1:], "long": RAGGED[:1]}
    metrics = SFTTrainer(tiny_model(), config(), eval_dataset=parts).evaluate()
    assert {"eval_short_loss", "eval_long_loss"} <= set(metrics)


def test_prepared_datasets_can_be_left_as_they_are(config):
    arguments = config(dataset_kwargs={"skip_prepare_dataset": True})
    raw = [{"anything": 1}]
    assert SFTTrainer(tiny_model(), arguments, data_collator=list, train_dataset=raw).train_dataset is raw


def test_a_model_by_its_path(config, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    arguments = config(dataset_text_field="text", model_init_kwargs={"attn_implementation": "eager"})
    trainer = SFTTrainer(str(tmp_path / "model"), arguments, train_dataset=TEXTS)
    assert isinstance(trainer.model, GPT2LMHeadModel) and trainer.model.config._attn_implementation == "eager"
    assert trained_on(trainer)[0] == [3, 4, 5]


@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig])
def test_arguments_are_overridden_and_not_changed(tmp_path, kind):
    args = kind(output_dir=str(tmp_path), learning_rate=0.5, report_to="none", use_cpu=True)
    trainer = SFTTrainer(tiny_model(), args, train_dataset=COUNTING, max_seq_length=3)
    assert isinstance(trainer.args, SFTConfig) and trainer.args.learning_rate == 0.5
    assert trained_on(trainer)[0] == COUNTING[0]["input_ids"][:3]
    assert getattr(args, "max_seq_length", None) is None


def test_predictions_are_the_logits(config):
    seen = []

    def metrics(result):
        seen.append((result.predictions.shape, result.label_ids.tolist()))
        return {"seen": 1.0}

    trainer = SFTTrainer(tiny_model(), config(), eval_dataset=RAGGED, compute_metrics=metrics)
    assert trainer.evaluate()["eval_seen"] == 1.0
    assert seen == [((3, 5, tiny_models.VOCAB), pad_samples(RAGGED)["labels"].tolist())]


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        ([], {}, "SFTTrainer: train_dataset must hold at least one example, got none"),
        ([{"input_ids": [1, 2]}, {"input_ids": [3]}], {},
         r"SFTTrainer: train_dataset\[1\] must be one row of at least 2 tokens, got shape \[1\]"),
        ([{"input_ids": torch.ones(2, 2, dtype=int)}], {},
         r"SFTTrainer: train_dataset\[0\] must be one row .* got shape \[2, 2\]"),
        ([{"input_ids": [1, 2], "labels": [1]}], {},
         r"train_dataset\[0\]: labels must have 2 entries as input_ids, got 1"),
        (TEXTS, {}, r"train_dataset\[0\] must hold input_ids, got the columns \['by', 'text'\]; give dataset_text_field"),
        (TEXTS, {"dataset_text_field": "t"}, r"\[0\] must hold input_ids or 't', got the columns \['by', 'text'\]"),
        (TEXTS, {"dataset_text_field": "text"}, "must be token ids where no tokenizer is given, got the text 'w3 w4 w5'"),
        (TEXTS, {"formatting_func": lambda examples: "w3"},
         "formatting_func must return a list with one text per example, got 'w3'"),
        (COUNTING, {"packing": True}, "SFTConfig: packing must be False, got True; cut the texts into rows"),
        (COUNTING, {"use_liger": True}, "SFTConfig: use_liger must be False, got True; the loss is computed by"),
        (COUNTING, {"tokenizer": 1, "processing_class": 1}, "SFTTrainer: tokenizer must be None where processing_class"),
        (COUNTING, {"model_init_kwargs": {"dtype": "auto"}}, "SFTTrainer: model must be a name or path where"),
    ],
)  # fmt: skip
def test_rejects_bad_datasets_and_arguments(config, dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        SFTTrainer(tiny_model(), config(), train_dataset=dataset, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"train_dataset": 3},
            "train_dataset must be a datasets.Dataset, a list of dicts or a torch dataset .* got int",
        ),
        (
            {"infinite": True},
            r"SFTTrainer: arguments must be those of TRL 0.11 or SFTConfig fields, got \['infinite'\]",
        ),
        ({"peft_config": {}}, "SFTTrainer: peft_config must be a peft.PeftConfig, got dict"),
    ],
)
def test_rejects_wrong_types(config, arguments, message):
    pytest.importorskip("peft")
    with pytest.raises(TypeError, match=message):
        SFTTrainer(tiny_model(), config(), **arguments)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_seq_length", 1, "SFTConfig: max_seq_length must be >= 2 or None, got 1"),
        ("packing", True, "SFTConfig: packing must be False, got True"),
        ("label_smoothing_factor", 0.1, "SFTConfig: label_smoothing_factor must be 0.0, got 0.1"),
        ("dataset_kwargs", {"infinite": 1}, r"SFTConfig: dataset_kwargs must be of .* got \['infinite'\]"),
    ],
)
def test_rejects_bad_settings(config, field, value, message):
    with pytest.raises(ValueError, match=message):
        config(**{field: value})


def test_a_sample_that_the_model_cannot_read_is_named(config):
    row = {"input_ids": [3] * 11}
    with pytest.raises(
        ValueError, match=r"train_dataset\[1\] must hold at most 8 tokens, .*, got 9; lower max_seq_length"
    ):
        SFTTrainer(tiny_model(8), config(max_seq_length=9), train_dataset=[RAGGED[0], row])
    with pytest.raises(ValueError, match=r"eval_dataset\[0\] must hold token ids in the vocabulary \[0, 48\), got 48"):
        SFTTrainer(tiny_model(8), config(), eval_dataset=[{"input_ids": [3, 48]}])
    assert trained_on(SFTTrainer(tiny_model(8), config(), train_dataset=[row])) == [[3] * 8]


def test_a_batch_that_the_model_cannot_read_is_refused(config):
    """Of a data_collator of the user's own, whose examples are not seen before."""
    model = tiny_model(8)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for ids, text in (([3] * 9, "at most 8 tokens, .*, got 9"), ([3, 48], "token ids in the vocabulary .*, got 48")):
        trainer = SFTTrainer(
            model, config(dataset_kwargs={"skip_prepare_dataset": True}), train_dataset=[{"input_ids": ids}]
        )
        with pytest.raises(ValueError, match=f"SFTTrainer: input_ids must hold {text}"):
            trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_rotary_positions_have_no_end(config):
    model = tiny_models.llama(max_position_embeddings=4)
    assert trained_on(SFTTrainer(model, config(), train_dataset=[{"input_ids": [3] * 11}])) == [[3] * 11]


@pytest.mark.parametrize("kind", ["train_dataset", "eval_dataset"])
def test_several_splits(config, kind):
    """As one dataset they are refused; as datasets to evaluate on they are several."""
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(RAGGED), test=datasets.Dataset.from_list(COUNTING))
    if kind == "eval_dataset":
        assert set(SFTTrainer(tiny_model(), config(), eval_dataset=splits).eval_dataset) == {"train", "test"}
        return
    for several in (splits, {"train": RAGGED}):
        with pytest.raises(TypeError, match=r"train_dataset must be one split, such as train_dataset\['train'\], got "):
            SFTTrainer(tiny_model(), config(), train_dataset=several)
