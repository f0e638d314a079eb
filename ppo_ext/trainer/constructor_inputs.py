"""Checks on what a user hands to `PPOTrainer(...)`."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .config import PPOConfig
from .datasets import check_dataset


def check_types(config: Any, model: Any, ref_model: Any, tokenizer: Any, dataset: Any, lr_scheduler: Any) -> None:
    """Raises TypeError that names the first argument of a wrong type."""
    with_value_head = "a model with a value head, such as AutoModelForCausalLMWithValueHead"
    _require(isinstance(config, PPOConfig), "config", "a PPOConfig", config)
    _require(_has_value_head(model), "model", with_value_head, model)
    _require(ref_model is None or _has_value_head(ref_model), "ref_model", f"None or {with_value_head}", ref_model)
    _require(isinstance(tokenizer, PreTrainedTokenizerBase), "tokenizer", "a transformers tokenizer", tokenizer)
    if dataset is not None:
        check_dataset(dataset)
    is_scheduler = isinstance(lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    _require(lr_scheduler is None or is_scheduler, "lr_scheduler", "a torch LRScheduler", lr_scheduler)


def _require(holds: bool, argument: str, kind: str, got: object) -> None:
    if not holds:
        raise TypeError(f"PPOTrainer: {argument} must be {kind}, got {type(got).__name__}")


def _has_value_head(model: Any) -> bool:
    return isinstance(model, torch.nn.Module) and hasattr(model, "pretrained_model") and hasattr(model, "v_head")
