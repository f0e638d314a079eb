"""Checks on what a user hands to `PPOTrainer.step`: one sentence that names argument, index, expectation and value."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch

from ..models.limits import Limits
from ..ops import check

Tensors: TypeAlias = Sequence[torch.Tensor]
Scores: TypeAlias = Sequence[torch.Tensor | float]
# queries, responses, scores, response_masks and rollout_logprobs, on the device
Batch: TypeAlias = tuple[
    list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor] | None, list[torch.Tensor] | None
]

_ROUNDED = 1e-3  # what a log-probability may be by rounding
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def fail(
    argument: str, condition: str, got: object, kind: type[Exception] = ValueError, where: str = "PPOTrainer.step"
) -> NoReturn:
    """Raises the one error sentence of this module."""
    raise kind(f"{where}: {argument} must {condition}, got {got}")


def check_lengths(batch_size: int | None, **lists: Sequence[Any]) -> None:
    """Every argument is a list, all of one length: batch_size, unless that is None."""
    expected, of = batch_size, "config.batch_size"
    for name, items in lists.items():
        if not isinstance(items, (list, tuple)):
            fail(name, "be a list with one entry per sample", type(items).__name__, TypeError)
        if expected is None:
            expected, of = len(items), f"len({name})"
        if len(items) != expected:
            fail(name, f"have {of} = {expected} entries", len(items))


def check_ragged(batch_size: int, queries: Any) -> None:
    """A batch may have fewer samples than config.batch_size, but at least one."""
    if isinstance(queries, (list, tuple)) and not 1 <= len(queries) <= batch_size:
        fail("queries", f"have from 1 to config.batch_size = {batch_size} entries", len(queries))


def token_ids(
    name: str, items: Sequence[Any], device: torch.device, where: str = "PPOTrainer.step"
) -> list[torch.Tensor]:
    """1-D integer tensors of at least one token each, as int64 on the device."""
    for i, item in enumerate(items):
        if not isinstance(item, torch.Tensor):
            fail(f"{name}[{i}]", "be a 1-D tensor of token ids", type(item).__name__, TypeError, where)
        check.values(where, f"{name}[{i}]", item)
        if item.dtype not in _INTEGERS:
            fail(f"{name}[{i}]", "hold integer token ids", item.dtype, TypeError, where)
        if item.dim() != 1:
            fail(f"{name}[{i}]", "be a 1-D tensor of token ids", f"shape {list(item.shape)}", where=where)
        if item.numel() == 0:
            fail(f"{name}[{i}]", "hold at least one token", 0, where=where)
    return [item.to(device=device, dtype=torch.int64) for item in items]


def score_tensors(scores: Scores, device: torch.device) -> list[torch.Tensor]:
    """Numbers, or tensors or arrays of one element with at most one dimension, as 0-d float32 tensors on the device."""
    result = []
    for i, score in enumerate(scores):
        if isinstance(score, (np.generic, np.ndarray)) and score.dtype.kind in "biufc":
            score = torch.as_tensor(score if score.dtype.kind == "c" else np.asarray(score, dtype=np.float64))
        if isinstance(score, torch.Tensor):
            check.values("PPOTrainer.step", f"scores[{i}]", score)
            if score.dim() > 1 or score.numel() != 1:
                fail(f"scores[{i}]", "be a single number", f"a tensor of shape {list(score.shape)}")
            if score.is_complex():
                fail(f"scores[{i}]", "be a real number", score.dtype, TypeError)
            result.append(score.detach().reshape(()).to(device=device, dtype=torch.float32))
        elif isinstance(score, Real):
            result.append(torch.tensor(_finite_float(i, score), dtype=torch.float32, device=device))
        else:
            fail(f"scores[{i}]", "be a number or a tensor of one element", type(score).__name__, TypeError)
    return result


def _finite_float(i: int, score: Real) -> float:
    try:
        return float(score)
    except (OverflowError, ValueError) as error:  # 10**400, for example
        fail(f"scores[{i}]", "be finite in float32", error)


def mask_tensors(masks: Tensors | None, responses: Tensors, device: torch.device) -> list[torch.Tensor] | None:
    """One 1-D mask per response, of its length, on the device; None stays None."""
    if masks is None:
        return None
    for i, (mask, response) in enumerate(zip(masks, responses, strict=True)):
        if not isinstance(mask, torch.Tensor):
            fail(f"response_masks[{i}]", "be a 1-D tensor", type(mask).__name__, TypeError)
        check.values("PPOTrainer.step", f"response_masks[{i}]", mask)
        if mask.shape != response.shape:
            fail(f"response_masks[{i}]", f"have the shape {list(response.shape)} of responses[{i}]", list(mask.shape))
    return [mask.to(device) for mask in masks]


def rollout_tensors(
    rows: Tensors | None, responses: Tensors, masks: Tensors | None, device: torch.device, is_encoder_decoder: bool
) -> list[torch.Tensor] | None:
    """One 1-D tensor of log-probabilities per response, of its length, float32 on the device; None stays None.

    They are finite and at most 0 where a token counts; the others are not read. One host/device sync.
    """
    if rows is None:
        return None
    for i, (row, response) in enumerate(zip(rows, responses, strict=True)):
        if not isinstance(row, torch.Tensor):
            fail(f"rollout_logprobs[{i}]", "be a 1-D tensor of log-probabilities", type(row).__name__, TypeError)
        check.values("PPOTrainer.step", f"rollout_logprobs[{i}]", row)
        if not row.is_floating_point():
            fail(f"rollout_logprobs[{i}]", "hold floats", row.dtype, TypeError)
        if row.shape != response.shape:
            got = list(row.shape)
            fail(f"rollout_logprobs[{i}]", f"have the shape {list(response.shape)} of responses[{i}]", got)
    found = [row.detach().to(device=device, dtype=torch.float32) for row in rows]
    first = 2 if is_encoder_decoder else 0
    bad = [(row.isfinite() & (row <= _ROUNDED)).logical_not() for row in found]
    if masks is not None:
        bad = [wrong & (mask != 0) for wrong, mask in zip(bad, masks, strict=True)]
    if torch.cat([wrong[first:] for wrong in bad]).any():
        i = next(i for i, wrong in enumerate(bad) if wrong[first:].any())
        t = first + int(bad[i][first:].int().argmax())
        fail(f"rollout_logprobs[{i}][{t}]", "be finite and at most 0, a log-probability", found[i][t].item())
    return found


def check_contents(
    queries: Tensors,
    responses: Tensors,
    scores: Tensors,
    masks: Tensors | None,
    limits: Limits,
    is_encoder_decoder: bool,
    counts: torch.Tensor,
    may_sit_out: bool = False,
) -> list[int]:
    """Token ids lie in the vocabulary, scores are finite, and in each response a token counts.

    may_sit_out: it is right as well if no token counts in any of them.
    Returns: counts, an int64 tensor, on the host.

    One host/device sync for a good batch. Only a bad batch is read a second time, to name the sample.
    """
    ids = torch.cat([*queries, *responses])
    counted = [_counted(i, responses, masks, is_encoder_decoder) for i in range(len(responses))]
    facts = [ids.min(), ids.max(), torch.isfinite(torch.stack([*scores])).all(), torch.stack(counted).all()]
    facts += [torch.stack(counted).any(), *counts]
    low, high, finite, every_row_counts, any_row_counts, *on_host = torch.stack(
        [fact.long() for fact in facts]
    ).tolist()
    _check_range(low, high, limits, queries=queries, responses=responses)
    for i, score in enumerate([] if finite else scores):
        if not torch.isfinite(score):
            fail(f"scores[{i}]", "be finite in float32", score.item())
    sits_out = may_sit_out and not any_row_counts
    for i, any_counts in enumerate([] if every_row_counts or sits_out else counted):
        if not any_counts:
            _fail_uncounted(i, responses, masks)
    return on_host


def _counted(i: int, responses: Tensors, masks: Tensors | None, is_encoder_decoder: bool) -> torch.Tensor:
    """Whether any token of response i counts; the first two of an encoder-decoder response never do."""
    mask = torch.ones_like(responses[i]) if masks is None else masks[i]
    return (mask[2 if is_encoder_decoder else 0 :] != 0).any()


def any_counts(responses: Tensors, masks: Tensors | None, is_encoder_decoder: bool) -> bool:
    """Whether a token of any response counts. One host/device sync."""
    return bool(torch.stack([_counted(i, responses, masks, is_encoder_decoder) for i in range(len(responses))]).any())


def _fail_uncounted(i: int, responses: Tensors, masks: Tensors | None) -> NoReturn:
    if masks is None:
        fail(f"responses[{i}]", "hold at least 3 tokens for an encoder-decoder model", len(responses[i]))
    fail(f"response_masks[{i}]", "leave at least one token that counts", masks[i].tolist())


def check_ids(limits: Limits, where: str, **lists: Tensors) -> None:
    """Token ids lie in the vocabulary."""
    ids = torch.cat([item for items in lists.values() for item in items])
    low, high = torch.stack([ids.min(), ids.max()]).tolist()
    _check_range(low, high, limits, where, **lists)


def _check_range(low: int, high: int, limits: Limits, where: str = "PPOTrainer.step", **lists: Tensors) -> None:
    """Names the first bad id, if the lowest or the highest is bad."""
    end = math.inf if limits.vocabulary is None else limits.vocabulary
    if 0 <= low and high < end:
        return
    condition = "not be negative" if limits.vocabulary is None else f"lie in {limits.vocabulary_of} [0, {end})"
    for name, items in lists.items():
        for i, item in enumerate(items):
            for t, token in enumerate(item.tolist()):
                if not 0 <= token < end:
                    fail(f"{name}[{i}][{t}]", condition, token, where=where)


def check_context(queries: Tensors, responses: Tensors, limits: Limits, is_encoder_decoder: bool) -> None:
    """Query plus response (each alone for an encoder-decoder model) fit what the models can read, in tokens."""
    for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
        if is_encoder_decoder:
            _check_length(f"queries[{i}]", len(query), limits.encoder_length)
            _check_length(f"responses[{i}]", len(response), limits.length)
        elif limits.length is not None and len(query) + len(response) > limits.length:
            fail(
                f"queries[{i}] and responses[{i}]",
                f"together fit the model's context of {limits.length} tokens",
                f"{len(query)} + {len(response)} = {len(query) + len(response)}",
            )


def _check_length(name: str, length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        fail(name, f"fit the model's context of {limit} tokens", length)
