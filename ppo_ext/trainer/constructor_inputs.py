"""Checks on what a user hands to `PPOTrainer(...)`."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from . import critic
from .config import PPOConfig
from .datasets import check_dataset


def check_types(
    config: Any, model: Any, ref_model: Any, tokenizer: Any, dataset: Any, lr_scheduler: Any, critic_model: Any
) -> None:
    """Raises TypeError that names the first argument of a wrong type. With a critic, policies need no value head."""
    with_value_head = "a model with a value head, such as AutoModelForCausalLMWithValueHead"
    without = critic_model is not None
    _require(isinstance(config, PPOConfig), "config", "a PPOConfig", config)
    _require(_is_policy(model, without), "model", with_value_head, model)
    _require(ref_model is None or _is_policy(ref_model, without), "ref_model", f"None or {with_value_head}", ref_model)
    is_critic = critic_model is None or _has_value_head(critic_model) or critic.has_token_head(critic_model)
    per_token = "or one with a score for each token, such as AutoModelForSequenceClassification with num_labels=1"
    _require(is_critic, "critic_model", f"None, {with_value_head}, {per_token}", critic_model)
    _require(isinstance(tokenizer, PreTrainedTokenizerBase), "tokenizer", "a transformers tokenizer", tokenizer)
    if dataset is not None:
        check_dataset(dataset)
    is_scheduler = isinstance(lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    _require(lr_scheduler is None or is_scheduler, "lr_scheduler", "a torch LRScheduler", lr_scheduler)


def _require(holds: bool, argument: str, kind: str, got: object) -> None:
    if not holds:
        raise TypeError(f"PPOTrainer: {argument} must be {kind}, got {type(got).__name__}")


def _is_policy(model: Any, without_value_head: bool) -> bool:
    return _has_value_head(model) or (without_value_head and critic.is_language_model(model))


def _has_value_head(model: Any) -> bool:
    return isinstance(model, torch.nn.Module) and hasattr(model, "pretrained_model") and hasattr(model, "v_head")
