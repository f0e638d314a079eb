"""Batches of fewer samples than config.batch_size: into which minibatches they go, and the samples that fill these up."""

import math

import torch

from .step_inputs import Batch


def rows_of_step(samples: int, mini_batch_size: int, accumulation: int) -> int:
    """How many rows a step has if the minibatches of one update shall be of one size, at least `samples`.

    A last update of fewer samples has as many minibatches as the others, of fewer rows; at most accumulation - 1 are empty.
    """
    whole, rest = divmod(samples, mini_batch_size * accumulation)
    return whole * mini_batch_size * accumulation + accumulation * math.ceil(rest / accumulation)


def cut(order: list[int], mini_batch_size: int, accumulation: int) -> list[list[int]]:
    """The minibatches of an epoch, from the rows in their order; their number is one of `rows_of_step`."""
    size = mini_batch_size * accumulation
    updates = [order[start : start + size] for start in range(0, len(order), size)]
    return [rows[i :: accumulation] if len(rows) < size else rows[i * mini_batch_size : (i + 1) * mini_batch_size]
            for rows in updates for i in range(accumulation)]  # fmt: skip


def filled_up(batch: Batch, rows: int) -> Batch:
    """The batch with that many rows: those that are added are the shortest sample, of which no token counts.

    Rows that are too many are left out: those of a process that sits out, in which no token counts either.
    """
    queries, responses, scores, masks, rollout = batch
    missing = rows - len(queries)
    if missing <= 0:
        return queries[:rows], responses[:rows], scores[:rows], masks and masks[:rows], rollout and rollout[:rows]
    row = min(range(len(queries)), key=lambda i: len(queries[i]) + len(responses[i]))
    masks = [torch.ones_like(ids) for ids in responses] if masks is None else masks
    return (
        queries + [queries[row]] * missing,
        responses + [responses[row]] * missing,
        scores + [torch.zeros_like(scores[row])] * missing,
        masks + [torch.zeros_like(masks[row])] * missing,
        rollout and rollout + [torch.zeros_like(rollout[row])] * missing,
    )
