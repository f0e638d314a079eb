"""One update from many parts: how much each minibatch counts in it, and the statistics of the parts together.

The parts of an update are the `accumulation` minibatches that every process accumulates. Its loss is that of all of them as
one minibatch of one process: with the default aggregation, the mean over all their tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .stats import WANDB_PADDING, stack_dicts

_VARIANCES = {"returns/var": "returns/mean", "val/var": "val/mean"}  # each with the mean that it is about
_EXTREMES = {"policy/ratio_max": torch.amax, "policy/ratio_min": torch.amin}
_WIDE = {"mps": torch.float32}  # the widest dtype of a device, where it is not float64
_LOSSES = ("loss/policy", "loss/value", "loss/total", "loss/entropy")  # 0 where the ratio guard has left an update out


def tokens_of_minibatches(mask: torch.Tensor, minibatches: Sequence[Sequence[int]]) -> torch.Tensor:
    """How many tokens of this process count in each minibatch, float32 [minibatches]. mask: [B, T]."""
    return _sums((mask != 0).sum(dim=1), minibatches)


def rows_of_minibatches(mask: torch.Tensor, minibatches: Sequence[Sequence[int]]) -> torch.Tensor:
    """In how many rows of each minibatch a token counts, float32 [minibatches]. mask: [B, T]."""
    return _sums((mask != 0).any(dim=1), minibatches)


def _sums(of_rows: torch.Tensor, minibatches: Sequence[Sequence[int]]) -> torch.Tensor:
    order = torch.tensor([row for rows in minibatches for row in rows], device=of_rows.device)
    parts = of_rows[order].split([len(rows) for rows in minibatches])
    return torch.stack([part.sum() for part in parts]).to(torch.float32)


def denominators_of_minibatches(
    mask: torch.Tensor, minibatches: Sequence[Sequence[int]], aggregation: str
) -> torch.Tensor | None:
    """What `ppo_loss` divides the loss of each minibatch by, but for a constant; None for a sum, which is not divided."""
    if aggregation == "token_sum":
        return None
    return (tokens_of_minibatches if aggregation == "token_mean" else rows_of_minibatches)(mask, minibatches)


def weights_of_minibatches(counts: torch.Tensor, accumulation: int, accelerator: Any) -> torch.Tensor:
    """What the mean of each minibatch is multiplied by, [..., minibatches]: its share in the counts of its update.

        weight = parts * counts / (counts of the update),   parts = accumulation * processes

    accelerate divides the loss by `accumulation` and averages the gradient over the processes, which `parts` undoes. One
    collective with several processes; no host/device sync.
    """
    totals = counts.unflatten(-1, (-1, accumulation)).sum(dim=-1)
    if accelerator.num_processes > 1:
        totals = accelerator.reduce(totals, reduction="sum")
    parts = accumulation * accelerator.num_processes
    return parts * counts / totals.clamp(min=1.0).repeat_interleave(accumulation, dim=-1)


def stack_whole_updates(
    all_stats: Sequence[Mapping[str, torch.Tensor]],
    tokens: torch.Tensor,
    accumulation: int,
    skipped: Sequence[int],
    parts_of: Any = None,
    denominators: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The statistics of all updates, [updates, 1] each; arrays as one row, [1, all entries], minibatch by minibatch.

    Means are over the tokens of an update, and variances are those of all its tokens. Losses are aggregated as the loss is.

    Args:
        all_stats: of each minibatch. tokens: [minibatches], those that count. skipped: updates that were left out.
        denominators: [minibatches], of the losses; None: they are sums.
        parts_of: None, or a function that makes of one tensor [n] those of all processes, [processes, n].
    """
    stacked = stack_dicts(all_stats)
    count = len(all_stats)
    own = tokens if denominators is None else denominators
    flat = torch.cat([tokens, own, *(x.float().flatten() for x in stacked.values())])
    parts = flat[None] if parts_of is None else parts_of(flat)
    tokens, own, *columns = parts.split([count, count, *(x.numel() for x in stacked.values())], dim=1)
    n, of_losses = (_by_update(x, count, accumulation) for x in (tokens, own))
    found = {key: column.reshape(len(parts), count, -1) for key, column in zip(stacked, columns, strict=True)}
    numbers = {key: _by_update(x, count, accumulation) for key, x in found.items() if x.shape[2] == 1}
    result = {key: _one_row(x, [row[key].numel() for row in all_stats]) for key, x in found.items() if x.shape[2] != 1}
    for key, x in numbers.items():
        if key in _EXTREMES:
            combined = _extreme(key, x, n)
        elif key in _LOSSES and denominators is None:
            combined = torch.where(n > 0, x, 0.0).sum(dim=1)
        elif key in _LOSSES:
            combined = _combine(x, of_losses, None)
        else:
            combined = _combine(x, n, numbers.get(_VARIANCES.get(key, "")))
        result[key] = combined.to(torch.float32)[:, None]
    for key in _LOSSES:
        if key in result:
            result[key][[*skipped]] = 0.0
    if "policy/advantages" in result:
        result["policy/advantages"] = torch.nan_to_num(result["policy/advantages"], WANDB_PADDING)
    return {key: result[key] for key in stacked}


def _one_row(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Arrays of each minibatch of each process [processes, minibatches, n], of which the first entries count -> [1, all]."""
    return torch.cat([part[:, :size].flatten() for part, size in zip(x.unbind(dim=1), sizes, strict=True)])[None]


def _by_update(x: torch.Tensor, count: int, accumulation: int) -> torch.Tensor:
    """One number a minibatch of each process -> [updates, parts], in the order of the ranks."""
    rows = x.reshape(-1, count // accumulation, accumulation).to(_WIDE.get(x.device.type, torch.float64))
    return rows.transpose(0, 1).reshape(count // accumulation, -1)


def _combine(x: torch.Tensor, n: torch.Tensor, means: torch.Tensor | None) -> torch.Tensor:
    """The mean of each row of x [updates, parts], weighted by n; with means, x holds the unbiased variances about them."""
    total = n.sum(dim=1)
    mean = _weighted_mean(x if means is None else means, n, total)
    if means is None:
        return mean
    squares = torch.where(n > 0, x * (n - 1).clamp(min=0) + n * (means - mean[:, None]).square(), 0.0).sum(dim=1)
    return squares / (total - 1).clamp(min=1.0)


def _extreme(key: str, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """The largest or smallest of each row of x [updates, parts], of the parts with tokens; 0 without any."""
    none = float("-inf") if key == "policy/ratio_max" else float("inf")
    found = _EXTREMES[key](torch.where(n > 0, x, none), dim=1)
    return torch.where((n > 0).any(dim=1), found, 0.0)


def _weighted_mean(x: torch.Tensor, n: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return torch.where(n > 0, n * x, 0.0).sum(dim=1) / total.clamp(min=1.0)
