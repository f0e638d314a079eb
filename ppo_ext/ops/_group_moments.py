"""Mean and whitening over the tokens of several processes.

Each process computes the sum of its weights, its mean and its variance in float64; one all_gather brings them to all, who
merge them in rank order:

    n = sum_r n_r,   mean = sum_r n_r mean_r / n,   var = sum_r n_r (var_r + (mean_r - mean)^2) / n

so all have the same bits, and a process without a counted token adds nothing. The gradients are those of the sum of the
losses of all processes, and cost one more all_gather, of two numbers a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ._groups import gather

Options = tuple[str, bool, float]  # mode, unbiased and eps of masked_whiten
Moments = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # [R, C] and [R, C] -> [R, 3]


def merge(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of weights, mean, biased variance) of each process, [P, ..., 3] float64, -> those of all, three of [...]."""
    n, mean, var = parts.unbind(-1)
    total = n.sum(0)
    divisor = torch.where(total > 0, total, 1.0)
    all_mean = (n * mean).sum(0) / divisor
    return total, all_mean, (n * (var + (mean - all_mean).square())).sum(0) / divisor


def unbiased(total: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    """The unbiased variance; 0 where it is undefined."""
    return torch.where(total <= 1, 0.0, var * (total / torch.where(total <= 1, 1.0, total - 1)))


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, moments: Moments, group: Any) -> torch.Tensor:
        total, mean, _ = merge(gather(moments(rows.double(), weights.double()), group))
        ctx.save_for_backward(weights, total)
        ctx.group, ctx.dtype = group, rows.dtype
        return mean.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, total = ctx.saved_tensors
        all_grad = gather(grad.double(), ctx.group).sum(0)
        shares = weights * (all_grad / torch.where(total > 0, total, 1.0))[:, None]
        return torch.where(weights != 0, shares, 0.0).to(ctx.dtype), None, None, None


def mean_of_rows(rows: torch.Tensor, weights: torch.Tensor, moments: Moments, group: Any) -> torch.Tensor:
    """The mean of each row over the columns of all processes: [R, C] -> [R]. C may differ between processes, R may not."""
    return _Mean.apply(rows, weights, moments, group)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, weights: torch.Tensor, options: Options, moments: Moments, group: Any
    ) -> torch.Tensor:
        row, row_weights = values.reshape(1, -1).double(), weights.reshape(1, -1).double()
        total, mean, var = merge(gather(moments(row, row_weights), group))
        mode, is_unbiased, eps = options
        scale = torch.rsqrt((unbiased(total, var) if is_unbiased else var) + eps)
        ctx.save_for_backward(values, weights, total, mean, scale)
        ctx.mode, ctx.unbiased, ctx.group = mode, is_unbiased, group
        whitened = (values.double() if mode == "scale" else values.double() - mean) * scale
        whitened = whitened + mean if mode == "keep_mean" else whitened
        return torch.where(weights != 0, whitened, 0.0).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, weights, total, mean, scale = ctx.saved_tensors
        counts, weights = weights != 0, weights.double()
        grad = torch.where(counts, grad.double(), 0.0)
        shifted = torch.where(counts, values.double() - mean, 0.0)
        scaled = torch.where(counts, values.double(), 0.0) if ctx.mode == "scale" else shifted
        own = torch.stack([grad.sum(), (grad * scaled).sum()])
        through_mean, through_var = gather(own, ctx.group).sum(0).unbind()
        n = torch.where(total > 0, total, 1.0)
        degrees = total - 1 if ctx.unbiased else total
        degrees = torch.where(degrees <= 0, torch.inf, degrees)  # of freedom; of a constant variance without end
        of_mean = weights / n * through_mean
        through_shift = 0.0 if ctx.mode == "scale" else of_mean
        grad_values = scale * (grad - through_shift - weights * shifted * scale.square() / degrees * through_var)
        if ctx.mode == "keep_mean":
            grad_values = grad_values + of_mean
        return torch.where(counts, grad_values, 0.0).to(values.dtype), None, None, None, None


def whiten(values: torch.Tensor, weights: torch.Tensor, options: Options, moments: Moments, group: Any) -> torch.Tensor:
    """`masked_whiten` over the tokens of all processes; values and weights may have other shapes on each."""
    return _Whiten.apply(values, weights, options, moments, group)
