"""Training of a reward model on pairs of a chosen and a rejected sample."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import TrainingArguments

from ..models.limits import NO_LIMITS, Limits, limits_of
from .base import SupervisedTrainer, choose_tokenizer, copy_arguments, refuse
from .reward_loss import pair_losses
from .reward_scores import check_reward_model, one_score_each
from .sequences import Example, check_readable, check_row, convert_dataset, right_pad, tokenize
from .together import raised_by_all

SIDES = ("chosen", "rejected")


@dataclass
class RewardConfig(TrainingArguments):
    """Settings of `RewardTrainer`: transformers' TrainingArguments and these fields of TRL 0.11.

    Args:
        max_length: longer samples are cut; None: no limit. (TRL 0.11 does not cut; its collator ignores the limit.)
        dataset_num_proc: processes that tokenize a `datasets.Dataset`.
        center_rewards_coefficient: see `reward_loss`.
    Raises:
        ValueError: a field is out of its range or not supported.
    """

    optim: str = "adamw_torch_fused"
    remove_unused_columns: bool = False  # transformers would remove columns such as input_ids_chosen
    max_length: int | None = None
    dataset_num_proc: int | None = None
    center_rewards_coefficient: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """ValueError for a field that is out of its range or not supported."""
        refuse("RewardConfig", self, {"label_smoothing_factor": (0.0, "the loss has no label smoothing")})
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"RewardConfig: max_length must be >= 1 or None, got {self.max_length}")
        if self.center_rewards_coefficient is not None and not self.center_rewards_coefficient >= 0:
            raise ValueError(
                f"RewardConfig: center_rewards_coefficient must be >= 0 or None, got {self.center_rewards_coefficient}"
            )


class RewardTrainer(SupervisedTrainer):
    """`transformers.Trainer` on `reward_loss`; chosen and rejected samples go through the model in one forward pass.

    Evaluation reports the loss, accuracy (pairs with chosen > rejected), ties (pairs with equal rewards, which count as
    wrong) and margin (mean of chosen - rejected). Predictions, which `compute_metrics` gets, are the rewards [N, 2] of
    chosen and rejected samples; in TRL they are the softmax of the two, in which close rewards round to a tie.

    Args:
        model: a sequence classifier with num_labels=1 and a pad_token_id.
        args: a `RewardConfig`, or plain TrainingArguments; it is copied.
        data_collator: makes a batch, with the columns below, of examples as they are in the dataset. None: examples are
            encoded, and padded by `RewardDataCollatorWithPadding` with the model's pad_token_id.
        train_dataset, eval_dataset: a `datasets.Dataset`, a list of dicts or a torch dataset of dicts (eval_dataset:
            or a dict of those), with the columns input_ids_chosen and input_ids_rejected and, optionally,
            attention_mask_chosen and attention_mask_rejected; or with the texts chosen and rejected. Optionally margin,
            one number per pair.
        tokenizer: for texts; not needed for token ids.
        compute_metrics: None: `compute_accuracy`.
        max_length: overrides args.max_length.
        peft_config: a peft.PeftConfig; only the adapter is then trained.
        processing_class: the tokenizer under the name it has in later versions of TRL.
        Others: see `transformers.Trainer`.
    Raises:
        ValueError: num_labels != 1, no pad_token_id, a language model, an empty dataset, an example without both samples,
            an empty sample or one that the model cannot read, a text without tokenizer, or a margin that is not one
            finite number.
    Source: TRL 0.11.4, `RewardTrainer`.
    """

    args: RewardConfig

    @raised_by_all
    def __init__(
        self,
        model: torch.nn.Module | None = None,
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
        max_length: int | None = None,
        peft_config: Any = None,
        *,
        processing_class: Any = None,
    ):
        config = copy_arguments(RewardConfig, args, max_length=max_length, remove_unused_columns=False)
        config.check()
        tokenizer = choose_tokenizer("RewardTrainer", tokenizer, processing_class)
        if model is not None:
            check_reward_model("RewardTrainer", model)
        limits = NO_LIMITS if model is None else limits_of(model)
        convert = partial(_encode_pair, tokenizer=tokenizer, max_length=config.max_length, limits=limits)
        if data_collator is None:
            train_dataset, eval_dataset = (
                convert_dataset(f"RewardTrainer: {name}", dataset, convert, config.dataset_num_proc)
                for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset))
            )
        super().__init__(
            model,
            config,
            peft_config,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            model_init=model_init,
            compute_metrics=compute_metrics or compute_accuracy,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        trained: Any = self.model
        check_reward_model("RewardTrainer", trained)  # model_init may have made it
        self.pad_token_id: int = trained.config.pad_token_id
        if data_collator is None:
            self.data_collator = RewardDataCollatorWithPadding(trained.config)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The batch's share in `reward_loss`, 0-d float32; if asked, with {"rewards_chosen", "rewards_rejected"}."""
        input_ids = _stack(inputs["input_ids_chosen"], inputs["input_ids_rejected"], self.pad_token_id)
        mask = _stack(inputs["attention_mask_chosen"], inputs["attention_mask_rejected"], 0)
        check_readable("RewardTrainer: input_ids", input_ids, self.limits)
        logits = model(input_ids=input_ids, attention_mask=mask, return_dict=True).logits
        chosen, rejected = one_score_each("RewardTrainer", logits)[:, None].chunk(2)
        losses = pair_losses(chosen, rejected, inputs.get("margin"), self.args.center_rewards_coefficient)
        loss = self.mean_loss(losses.sum(), inputs, num_items_in_batch)
        return (loss, {"rewards_chosen": chosen, "rewards_rejected": rejected}) if return_outputs else loss

    def count_items(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The number of pairs in a batch."""
        return torch.tensor(len(inputs["input_ids_chosen"]))

    def predictions(self, inputs: dict[str, Any], outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(rewards [B, 2], labels [B]): the label 0 says that the first of the two should be larger."""
        rewards = torch.cat([outputs["rewards_chosen"], outputs["rewards_rejected"]], dim=1)
        return rewards, torch.zeros(len(rewards), device=rewards.device)


@dataclass
class RewardDataCollatorWithPadding:
    """Pairs as one batch, padded on the right to the longest sample of both sides.

    Args:
        tokenizer: a tokenizer, or anything else with a pad_token_id.
        padding: True or "longest"; or "max_length": pad to max_length.
        pad_to_multiple_of: round the width up to a multiple of this.
        return_tensors: "pt".
    Source: TRL 0.11.4, where each side has its own width.
    """

    tokenizer: Any
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: list[Example]) -> dict[str, Any]:
        """input_ids_chosen, attention_mask_chosen, ..., [B, T]; and margin [B], if the examples have it."""
        width = max(len(feature[f"input_ids_{side}"]) for feature in features for side in SIDES)
        if self.padding == "max_length":
            width = max(width, self.max_length or 0)
        multiple = self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        batch: dict[str, Any] = {"return_loss": True}
        for side in SIDES:
            rows = [feature[f"input_ids_{side}"] for feature in features]
            masks = [feature.get(f"attention_mask_{side}", [1] * len(row)) for feature, row in zip(features, rows)]
            batch[f"input_ids_{side}"] = right_pad(rows, self.tokenizer.pad_token_id, width)
            batch[f"attention_mask_{side}"] = right_pad(masks, 0, width)
        margins = [feature["margin"] for feature in features if "margin" in feature]
        if margins and len(margins) < len(features):
            raise ValueError(
                f"RewardTrainer: margin must be given for all pairs or for none, got {len(margins)} of {len(features)}"
            )
        if margins:
            batch["margin"] = torch.tensor(margins, dtype=torch.float32)
        return batch


def compute_accuracy(eval_pred: Any) -> dict[str, float]:
    """{"accuracy", "ties", "margin"} of rewards [N, 2]; see `RewardTrainer`.

    In TRL a tie counts as right, so that a model which gives every sample the same reward has an accuracy of 1.
    """
    rewards, _ = eval_pred
    difference = rewards[:, 0] - rewards[:, 1]
    return {
        "accuracy": float((difference > 0).mean()),
        "ties": float((difference == 0).mean()),
        "margin": float(difference.mean()),
    }


def _stack(chosen: torch.Tensor, rejected: torch.Tensor, value: int) -> torch.Tensor:
    """Two batches [B, T1] and [B, T2] as one [2B, T], the chosen ones first, padded on the right."""
    width = max(chosen.shape[1], rejected.shape[1])
    return torch.cat([pad(side, (0, width - side.shape[1]), value=value) for side in (chosen, rejected)])


def _encode_pair(example: Example, name: str, *, tokenizer: Any, max_length: int | None, limits: Limits) -> Example:
    """One pair with its columns as token ids, cut to max_length, and its margin if it has one."""
    pair: Example = {}
    for side in SIDES:
        ids, mask = example.get(f"input_ids_{side}"), example.get(f"attention_mask_{side}")
        if ids is None:
            if not isinstance(example.get(side), str):
                wanted = f"input_ids_{side} or the text {side}"
                raise ValueError(f"{name} must hold {wanted}, got the columns {sorted(example)}")
            limit = {} if max_length is None else {"truncation": True, "max_length": max_length}
            ids, mask = tokenize(f"{name}: {side}", example[side], tokenizer, **limit), None
        row = check_row(f"{name}: {side}", ids)
        mask = [1] * len(row) if mask is None else torch.as_tensor(mask).tolist()
        if len(mask) != len(row):
            raise ValueError(
                f"{name}: attention_mask_{side} must have {len(row)} entries as input_ids_{side}, got {len(mask)}"
            )
        row = row[:max_length]
        check_readable(f"{name}: {side}", row, limits, "set max_length to cut it")
        pair[f"input_ids_{side}"] = row.tolist()
        pair[f"attention_mask_{side}"] = mask[:max_length]
    if "margin" in example:
        margin = torch.as_tensor(float("nan") if example["margin"] is None else example["margin"], dtype=torch.float32)
        if margin.numel() != 1 or not torch.isfinite(margin).all():
            raise ValueError(f"{name}: margin must be one finite number, got {example['margin']}")
        pair["margin"] = margin.item()
    return pair
