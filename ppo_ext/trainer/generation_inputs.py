"""Checks on what a user hands to `PPOTrainer.generate`."""

from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig

from ..models.limits import Limits
from . import step_inputs
from .stopping import setting

fail = partial(step_inputs.fail, where="PPOTrainer.generate")


def check_options(query_tensor: Any, batch_size: Any, model: Any, options: Mapping[str, Any]) -> None:
    """Raises for arguments that no query makes valid."""
    if isinstance(query_tensor, torch.Tensor):
        made = ["input_ids", "inputs"]
        if query_tensor.dim() != 1:
            fail("query_tensor", "be a 1-D tensor or a list of 1-D tensors", f"shape {list(query_tensor.shape)}")
        returned = setting(model, options, "num_return_sequences") or 1
        if returned != 1:
            fail(
                "num_return_sequences",
                "be 1 for one query (for a list of queries it gives a list of responses)",
                returned,
            )
    elif isinstance(query_tensor, (list, tuple)):
        made = ["input_ids", "inputs", "attention_mask"]
    else:
        fail("query_tensor", "be a 1-D tensor or a list of 1-D tensors", type(query_tensor).__name__, TypeError)
    for name in made:
        if name in options:
            fail(name, "be left out, since it is made of query_tensor", type(options[name]).__name__, TypeError)
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool):
        fail("batch_size", "be an int", type(batch_size).__name__, TypeError)
    if batch_size < 1:
        fail("batch_size", "be at least 1", batch_size)


def check_new_tokens(queries: Sequence[torch.Tensor], model: Any, limits: Limits, options: Mapping[str, Any]) -> None:
    """Raises if queries, or what the model may write to them, are longer than it can read."""
    longest = max(map(len, queries))
    if getattr(model.config, "is_encoder_decoder", False):
        if limits.encoder_length is not None and longest > limits.encoder_length:
            fail("query_tensor", f"fit the model's context of {limits.encoder_length} tokens", longest)
        longest = 1  # the decoder's start token
    new, total = setting(model, options, "max_new_tokens"), setting(model, options, "max_length")
    if new is None:  # `generate` keeps its own default length within the context
        new = 0 if total is None or total == GenerationConfig().max_length else total - longest
    if limits.length is not None and longest + new > limits.length:
        fail(
            "query_tensor and max_new_tokens",
            f"together fit the model's context of {limits.length} tokens",
            f"{longest} + {new} = {longest + new}",
        )
