"""Mean, variance and whitening over the tokens that count."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _group_moments, _native, check, reference
from ._groups import check_group

_MODES = {"center": 0, "keep_mean": 1, "scale": 2}  # WhitenMode in csrc/masked.h
_OPTIONS = "int mode, bool unbiased, float eps"

_moments, _moments_name = _native.define("_masked_moments(Tensor values, Tensor weights) -> Tensor")
_whiten, _whiten_name = _native.define(
    f"_masked_whiten(Tensor values, Tensor weights, {_OPTIONS}) -> (Tensor whitened, Tensor moments)"
)
_whiten_backward, _whiten_backward_name = _native.define(
    f"_masked_whiten_backward(Tensor grad, Tensor values, Tensor weights, Tensor moments, {_OPTIONS}) -> Tensor"
)


@_native.register_fake(_moments_name)
def _(values, weights):
    return values.new_empty((values.shape[0], 3))


@_native.register_fake(_whiten_name)
def _(values, weights, *_):
    return torch.empty_like(values), values.new_empty(3)


@_native.register_fake(_whiten_backward_name)
def _(grad, values, *_):
    return torch.empty_like(values)


class _Moments(torch.autograd.Function):
    """(sum of weights, mean, biased variance) of each row of values and weights [R, C], as a tensor [R, 3]."""

    @staticmethod
    def forward(ctx, values, weights):
        moments = _moments(values, weights)
        ctx.save_for_backward(values, weights, moments)
        return moments

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, weights, moments = ctx.saved_tensors
        total, mean, _ = moments.unbind(1)
        grad_mean, grad_var = grad[:, 1:2], grad[:, 2:3]
        # If only the mean is used, grad_var is 0 and the values, which may be infinite, must not enter.
        through_var = torch.where(grad_var == 0, 0.0, 2.0 * grad_var * (values - mean[:, None]))
        # The selection comes last, so that no NaN, of a masked value or of the incoming gradient, reaches a masked
        # entry.
        return torch.where(weights != 0, weights / total[:, None] * (grad_mean + through_var), 0.0), None


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, weights, options):
        whitened, moments = _whiten(values, weights, *options)
        ctx.save_for_backward(values, weights, moments)
        ctx.options = options
        return whitened

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _whiten_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None


def _moments_of(values, weights):
    """(sum of weights, mean, biased variance) of each row [R, C], as a tensor [R, 3], on any device."""
    if _native.available(values.device.type):
        return _moments(values.contiguous(), weights.contiguous())
    pairs = zip(values, weights, strict=True)
    rows = [(w.sum(), reference.masked_mean(x, w), reference.masked_var(x, w, False)) for x, w in pairs]
    return torch.stack([torch.stack(row) for row in rows]) if rows else values.new_empty((0, 3))


def _prepare(op, values, mask):
    check.floating(op, "values", values)
    check.weights(op, mask)
    check.device(op, "mask", mask, values.device, "values")
    try:
        mask = mask.expand(values.shape)
    except RuntimeError:
        check.fail(op, "mask", f"broadcast to the shape {list(values.shape)} of values", list(mask.shape))
    return check.accumulate(values), mask


def _dimensions(values, axis):
    """The dimensions that `axis` names, counted from 0, in ascending order."""
    dims = values.dim()
    try:
        axes = [operator.index(a) for a in (axis if isinstance(axis, (tuple, list)) else [axis])]
    except TypeError:
        check.fail("masked_mean", "axis", "be None, an int or several", type(axis).__name__, TypeError)
    if not axes or not all(-dims <= a < dims for a in axes) or len({a % dims for a in axes}) < len(axes):
        check.fail("masked_mean", "axis", f"name dimensions of values, from [{-dims}, {dims}) and each once", axis)
    return sorted(a % dims for a in axes)


def _rows(values, mask, axes):
    """Values and weights as [R, C], where C holds the dimensions `axes` (all if None), and the shape of the result."""
    if axes is None:
        return values.reshape(1, -1).contiguous(), mask.reshape(1, -1).to(values.dtype).contiguous(), ()
    kept = [d for d in range(values.dim()) if d not in axes]
    shape = [values.shape[d] for d in kept]
    rows = torch.Size(shape).numel()
    order = kept + axes
    columns = values.numel() // rows if rows else 0
    return (
        values.permute(order).reshape(rows, columns).contiguous(),
        mask.permute(order).reshape(rows, columns).to(values.dtype).contiguous(),
        shape,
    )


def masked_mean(
    values: torch.Tensor,
    mask: torch.Tensor,
    axis: int | Sequence[int] | None = None,
    *,
    group: Any = None,
) -> torch.Tensor:
    """Mean over the tokens that count.

        masked_mean = sum(mask * values) / sum(mask)

    Args:
        values: any shape, float32, bfloat16, float16 or float64.
        mask: of a shape that broadcasts to that of values; bool, int or float. 0 where an entry does not count,
            elsewhere its weight, which is not negative and is rounded to the dtype of the result.
        axis: None for all dimensions, or one or several to reduce, each named once; negative ones count from the last.
        group: None, or a torch.distributed.ProcessGroup: the mean over the tokens of all its processes, the same bits on
            each. The result must have the same shape on all; the reduced dimensions may differ, also be empty. All
            processes must call it: one all_gather in the forward and one in the backward pass, whose gradient is that of
            the sum of all processes' losses. No host/device sync.

    Returns:
        A tensor of the shape of values without the reduced dimensions; float32 (float64 for float64). 0 where nothing
        counts. Differentiable once with respect to `values`.

    Raises:
        TypeError: values is not of a floating dtype, mask is complex or quantized, a tensor is not dense, axis is not
            of ints, or group is no process group.
        ValueError: mask does not broadcast to values, the devices differ, or axis does not name dimensions of values.

    Notes:
        Entries with mask 0 never influence the result. Sums run in float64 in a fixed order: same bits on every run and
        for any number of threads.

    Source: TRL 0.11.4, `masked_mean` (which divides by the sum of the mask before broadcasting, and gives NaN for an
    empty mask).
    """
    values, mask = _prepare("masked_mean", values, mask)
    axis = None if axis is None else _dimensions(values, axis)
    check_group("masked_mean", group)
    if group is not None:
        rows, weights, shape = _rows(values, mask, axis)
        return _group_moments.mean_of_rows(rows, weights, _moments_of, group).reshape(shape)
    if not _native.available(values.device.type):
        return reference.masked_mean(values, mask, axis)
    rows, weights, shape = _rows(values, mask, axis)
    return _Moments.apply(rows, weights)[:, 1].reshape(shape)


def masked_var(values: torch.Tensor, mask: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Variance over the tokens that count.

        masked_var = sum(mask * (values - masked_mean)^2) / n,   n = sum(mask),   times n / (n - 1) if unbiased

    Arguments, errors and determinism are those of `masked_mean`.

    Returns:
        A tensor of shape [], float32 (float64 for float64), differentiable once with respect to `values`. 0 where
        nothing counts and, if unbiased, for n <= 1: for one token, or for weights that sum to less.

    Source: TRL 0.11.4, `masked_var` (which raises ValueError for an empty mask and gives NaN for one token).
    """
    values, mask = _prepare("masked_var", values, mask)
    unbiased = check.flag("masked_var", "unbiased", unbiased)
    if not _native.available(values.device.type):
        return reference.masked_var(values, mask, unbiased)
    rows, weights, _ = _rows(values, mask, None)
    total, _, var = _Moments.apply(rows, weights)[0].unbind(0)
    if not unbiased:
        return var
    return torch.where(total <= 1, 0.0, var * (total / torch.where(total <= 1, 1.0, total - 1)))


def masked_whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    shift_mean: bool = True,
    *,
    mode: str | None = None,
    unbiased: bool = True,
    eps: float = reference.WHITEN_EPS,
    group: Any = None,
) -> torch.Tensor:
    """Values shifted and scaled to mean 0 and variance 1 over the tokens that count.

        masked_whiten = (values - mean) / sqrt(var + eps)               mode "center"
                        (values - mean) / sqrt(var + eps) + mean        mode "keep_mean"
                        values / sqrt(var + eps)                        mode "scale"

    with the unbiased or the biased variance of `masked_var`. Arguments, errors and determinism are those of
    `masked_mean`. With a group, mean and variance are over the tokens of all its processes, whose shapes may differ.

    Args:
        shift_mean: TRL's name of the mode: True is "center", False "keep_mean".
        mode: one of the three; None takes that of shift_mean.
        unbiased: whether the variance is the unbiased one.
        eps: what is added to the variance, in [1e-30, 1e30].

    Returns:
        A tensor of the shape of values, float32 (float64 for float64), differentiable once with respect to `values`. 0
        where the mask is 0. If one token counts, its variance is 0: its result is 0, with "keep_mean" its value, and
        with "scale" its value divided by sqrt(eps).

    Raises:
        ValueError: mode is not one of the three, or shift_mean is False and mode is not "keep_mean", too.

    Source: TRL 0.11.4, `masked_whiten` (which also transforms masked entries and gives NaN for one token).
    """
    values, mask = _prepare("masked_whiten", values, mask)
    options = _whiten_options(shift_mean, mode, unbiased, eps)
    check_group("masked_whiten", group)
    if group is not None:
        mode = next(name for name, number in _MODES.items() if number == options[0])
        return _group_moments.whiten(values, mask.to(values.dtype), (mode, *options[1:]), _moments_of, group)
    if not _native.available(values.device.type):
        shift_mean, mode = True, next(name for name, number in _MODES.items() if number == options[0])
        return reference.masked_whiten(values, mask, shift_mean, mode=mode, unbiased=options[1], eps=options[2])
    return _Whiten.apply(values.contiguous(), mask.to(values.dtype).contiguous(), options)


def _whiten_options(shift_mean, mode, unbiased, eps):
    """The options of the operators, checked."""
    op = "masked_whiten"
    shift_mean = check.flag(op, "shift_mean", shift_mean)
    unbiased = check.flag(op, "unbiased", unbiased)
    eps = check.positive(op, "eps", eps)
    if mode is None:
        return _MODES["center" if shift_mean else "keep_mean"], unbiased, eps
    if not isinstance(mode, str):
        check.fail(op, "mode", "be None or a str", type(mode).__name__, TypeError)
    if mode not in _MODES:
        check.fail(op, "mode", f"be one of {', '.join(map(repr, _MODES))}", repr(mode))
    if not shift_mean and mode != "keep_mean":
        check.fail(op, "mode", "be 'keep_mean' or None if shift_mean is False", repr(mode))
    return _MODES[mode], unbiased, eps
