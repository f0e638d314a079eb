"""Supervised fine-tuning of a causal language model: next-token prediction on texts or token ids."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from ..models import loading
from ..models.limits import NO_LIMITS, Limits, limits_of
from ..ops.logprobs import logprobs
from .base import SupervisedTrainer, choose_tokenizer, copy_arguments, refuse
from .sequences import Example, check_readable, check_row, convert_dataset, right_pad, tokenize
from .together import raised_by_all

IGNORED = -100  # label of a token that the loss leaves out, as everywhere in transformers
DEFAULT_MAX_LENGTH = 1024  # of texts, as in TRL
UNSUPPORTED = {
    "packing": (False, "cut the texts into rows of max_seq_length token ids beforehand"),
    "use_liger": (False, "the loss is computed by ppo_ext.logprobs"),
    "use_liger_kernel": (False, "the loss is computed by ppo_ext.logprobs"),
    "label_smoothing_factor": (0.0, "the loss has no label smoothing"),
}
DATASET_KWARGS = ("add_special_tokens", "skip_prepare_dataset")


@dataclass
class SFTConfig(TrainingArguments):
    """Settings of `SFTTrainer`: transformers' TrainingArguments and these fields of TRL 0.11.

    Args:
        dataset_text_field: the column that holds the text.
        max_seq_length: longer samples are cut. None: what the model can read for token ids (no limit for rotary
            positions); for texts the smallest of that, 1024 and the tokenizer's model_max_length.
        dataset_num_proc: processes that tokenize a `datasets.Dataset`.
        model_init_kwargs: passed to from_pretrained where the model is given by its name or path.
        dataset_kwargs: add_special_tokens (True) for the tokenizer; skip_prepare_dataset (False) leaves the datasets as
            they are, for a data_collator that does everything.
        dataset_batch_size, num_of_sequences, chars_per_token, eval_packing: accepted, without effect.
        packing, use_liger: must stay False.
    Raises:
        ValueError: a field is out of its range or not supported.
    """

    optim: str = "adamw_torch_fused"
    dataset_text_field: str | None = None
    packing: bool = False
    max_seq_length: int | None = None
    dataset_num_proc: int | None = None
    dataset_batch_size: int | None = 1000
    model_init_kwargs: dict[str, Any] | None = None
    dataset_kwargs: dict[str, Any] | None = None
    eval_packing: bool | None = None
    num_of_sequences: int = 1024
    chars_per_token: float = 3.6
    use_liger: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """ValueError for a field that is out of its range or not supported."""
        refuse("SFTConfig", self, UNSUPPORTED)
        if self.max_seq_length is not None and self.max_seq_length < 2:
            raise ValueError(f"SFTConfig: max_seq_length must be >= 2 or None, got {self.max_seq_length}")
        unknown = set(self.dataset_kwargs or {}) - set(DATASET_KWARGS)
        if unknown:
            raise ValueError(f"SFTConfig: dataset_kwargs must be of {DATASET_KWARGS}, got {sorted(unknown)}")


class SFTTrainer(SupervisedTrainer):
    """`transformers.Trainer` on the mean negative log-probability per token, by `ppo_ext.logprobs`.

    Args:
        model: a transformers causal LM, or the name or path of one.
        args: a `SFTConfig`, or plain TrainingArguments; it is copied.
        data_collator: makes a batch of examples: input_ids, attention_mask and labels [B, T], where a label of -100 is
            left out of the loss. None: right padding, by lengths.
        train_dataset, eval_dataset: a `datasets.Dataset`, a list of dicts or a torch dataset of dicts (eval_dataset:
            or a dict of those), with either the text column or input_ids and, optionally, attention_mask and labels.
        tokenizer: for texts; not needed for token ids.
        peft_config: a peft.PeftConfig; only the adapter is then trained.
        formatting_func: makes texts of other columns: {column: [value]} -> [text]. As in TRL it is written for lists of
            values; here they have one entry. Goes unused where dataset_text_field is given.
        processing_class: the tokenizer under the name it has in later versions of TRL.
        Others: see `transformers.Trainer`; fields of `SFTConfig` as keyword arguments override those in args.
    Raises:
        ValueError: an empty dataset, an example under 2 tokens or without text and token ids, a text without tokenizer, a
            token id outside the vocabulary, an example that is longer than the model can read after it was cut.
        TypeError: an argument that `SFTConfig` does not know, or a dataset or peft_config of another type.
    Source: TRL 0.11.4, `SFTTrainer`.
    """

    @raised_by_all
    def __init__(
        self,
        model: torch.nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        model_init: Callable[[], torch.nn.Module] | None = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: Any = None,
        dataset_text_field: str | None = None,
        packing: bool | None = None,
        formatting_func: Callable[[dict[str, list]], list[str]] | None = None,
        max_seq_length: int | None = None,
        *,
        processing_class: Any = None,
        **overrides: Any,
    ):
        overrides |= {"dataset_text_field": dataset_text_field, "packing": packing, "max_seq_length": max_seq_length}
        unknown = set(overrides) - {field.name for field in fields(SFTConfig)}
        if unknown:
            raise TypeError(
                f"SFTTrainer: arguments must be those of TRL 0.11 or SFTConfig fields, got {sorted(unknown)}"
            )
        config = copy_arguments(SFTConfig, args, **overrides)
        config.check()
        tokenizer = choose_tokenizer("SFTTrainer", tokenizer, processing_class)
        if isinstance(model, str):
            options = config.model_init_kwargs or {}
            tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
            model, _ = loading.load_pretrained(AutoModelForCausalLM, model, True, (), options)
        elif config.model_init_kwargs:
            raise ValueError("SFTTrainer: model must be a name or path where model_init_kwargs is given, got a model")
        limits = NO_LIMITS if model is None else limits_of(model)
        encoder = _Encoder(config, tokenizer, formatting_func, limits)

        def prepared(name: str, dataset: Any) -> Any:
            if (config.dataset_kwargs or {}).get("skip_prepare_dataset"):
                return dataset
            return convert_dataset(f"SFTTrainer: {name}", dataset, encoder, config.dataset_num_proc)

        super().__init__(
            model,
            config,
            peft_config,
            data_collator=data_collator or pad_samples,
            train_dataset=prepared("train_dataset", train_dataset),
            eval_dataset=prepared("eval_dataset", eval_dataset),
            processing_class=tokenizer,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The batch's share in the mean negative log-probability per token, 0-d float32; with the outputs if asked."""
        check_readable("SFTTrainer: input_ids", inputs["input_ids"], self.limits)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        targets = inputs["labels"][:, 1:]
        counted = targets != IGNORED
        target_logprobs = logprobs(outputs.logits[:, :-1], targets.masked_fill(~counted, 0), mask=counted)
        loss = self.mean_loss(-target_logprobs.sum(), inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def count_items(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The number of tokens that the loss counts; the first of a row is not predicted."""
        return (inputs["labels"][:, 1:] != IGNORED).sum()

    def predictions(self, inputs: dict[str, Any], outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits [B, T, V], labels [B, T])"""
        return outputs.logits, inputs["labels"]


def pad_samples(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Examples with input_ids and, optionally, attention_mask and labels as one batch, padded on the right.

    Without labels all tokens count. What is padding follows from the lengths and the masks that are given: the padding
    token's id inside a sample is a token like others.
    """
    rows = [example["input_ids"] for example in examples]
    mask = right_pad([e.get("attention_mask", [1] * len(row)) for e, row in zip(examples, rows, strict=True)])
    labels = right_pad([e.get("labels", row) for e, row in zip(examples, rows, strict=True)], IGNORED)
    return {"input_ids": right_pad(rows), "attention_mask": mask, "labels": labels.masked_fill(mask == 0, IGNORED)}


class _Encoder:
    """Turns one example of a dataset into token ids."""

    def __init__(self, config: SFTConfig, tokenizer: Any, formatting_func: Callable | None, limits: Limits):
        # Only what decides the result: the package datasets caches by a hash of all that is stored here.
        self.tokenizer, self.formatting_func = tokenizer, formatting_func
        self.text_field = config.dataset_text_field
        self.add_special_tokens = (config.dataset_kwargs or {}).get("add_special_tokens", True)
        self.limits = limits
        known = [limits.length, getattr(tokenizer, "model_max_length", None), DEFAULT_MAX_LENGTH]
        self.id_limit = config.max_seq_length or limits.length
        self.text_limit = config.max_seq_length or min(limit for limit in known if limit is not None)

    def __call__(self, example: Example, name: str) -> Example:
        """{"input_ids", and attention_mask and labels if the example has them}, cut; at least 2 tokens."""
        if "input_ids" not in example:
            ids = tokenize(
                name,
                self._text(example, name),
                self.tokenizer,
                add_special_tokens=self.add_special_tokens,
                truncation=True,
                max_length=self.text_limit,
            )
            return {"input_ids": self._checked(name, ids).tolist()}
        length = len(check_row(name, example["input_ids"], min_length=2))
        self._checked(name, torch.as_tensor(example["input_ids"])[: self.id_limit])
        given = [key for key in ("input_ids", "attention_mask", "labels") if example.get(key) is not None]
        for key in given:
            if len(example[key]) != length:
                raise ValueError(f"{name}: {key} must have {length} entries as input_ids, got {len(example[key])}")
        return {key: torch.as_tensor(example[key])[: self.id_limit].tolist() for key in given}

    def _checked(self, name: str, ids: Any) -> torch.Tensor:
        row = check_row(name, ids, min_length=2)
        check_readable(name, row, self.limits, "lower max_seq_length to cut it")
        return row

    def _text(self, example: Example, name: str) -> str:
        field = self.text_field
        if field is not None and field in example:
            return example[field]
        if field is not None or self.formatting_func is None:
            wanted = "input_ids" if field is None else f"input_ids or {field!r}"
            remedy = "" if field else "; give dataset_text_field or formatting_func for texts"
            raise ValueError(f"{name} must hold {wanted}, got the columns {sorted(example)}{remedy}")
        texts = self.formatting_func({key: [value] for key, value in example.items()})
        if not isinstance(texts, list) or len(texts) != 1:
            raise ValueError(f"SFTTrainer: formatting_func must return a list with one text per example, got {texts!r}")
        return texts[0]
