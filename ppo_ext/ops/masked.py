"""Mean, variance and whitening over the tokens that count."""

import operator

import torch
from torch.autograd.function import once_differentiable

from . import _native, check, reference

_moments, _moments_name = _native.define("_masked_moments(Tensor values, Tensor weights) -> Tensor")
_whiten, _whiten_name = _native.define(
    "_masked_whiten(Tensor values, Tensor weights, bool shift_mean) -> (Tensor whitened, Tensor moments)"
)
_whiten_backward, _whiten_backward_name = _native.define(
    "_masked_whiten_backward(Tensor grad, Tensor values, Tensor weights, Tensor moments, bool shift_mean) -> Tensor"
)


@_native.register_fake(_moments_name)
def _(values, weights):
    return values.new_empty((values.shape[0], 3))


@_native.register_fake(_whiten_name)
def _(values, weights, shift_mean):
    return torch.empty_like(values), values.new_empty(3)


@_native.register_fake(_whiten_backward_name)
def _(grad, values, weights, moments, shift_mean):
    return torch.empty_like(values)


class _Moments(torch.autograd.Function):
    """(sum of weights, mean, biased variance) of each row of [R, C], a tensor [R, 3]."""

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
        # Where only the mean is used, its gradient does not depend on the values, which may be infinite.
        through_var = torch.where(grad_var == 0, 0.0, 2.0 * grad_var * (values - mean[:, None]))
        # Selected last: neither a NaN in a masked value nor one in the incoming gradient reaches a masked entry.
        return torch.where(weights != 0, weights / total[:, None] * (grad_mean + through_var), 0.0), None


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, weights, shift_mean):
        whitened, moments = _whiten(values, weights, shift_mean)
        ctx.save_for_backward(values, weights, moments)
        ctx.shift_mean = shift_mean
        return whitened

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _whiten_backward(grad.contiguous(), *ctx.saved_tensors, ctx.shift_mean), None, None


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
    """`axis` as the numbers of the dimensions to reduce, in order."""
    dims = values.dim()
    try:
        axes = [operator.index(a) for a in (axis if isinstance(axis, (tuple, list)) else [axis])]
    except TypeError:
        check.fail("masked_mean", "axis", "be None, an int or several", type(axis).__name__, TypeError)
    if not axes or not all(-dims <= a < dims for a in axes) or len({a % dims for a in axes}) < len(axes):
        check.fail("masked_mean", "axis", f"name dimensions of values, from [{-dims}, {dims}) and each once", axis)
    return sorted(a % dims for a in axes)


def _rows(values, mask, axes):
    """values and weights as [R, C] with the dimensions in `axes` last, and the shape of the result; None for all."""
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


def masked_mean(values, mask, axis=None):
    """Mean over the tokens that count.

        masked_mean = sum(mask * values) / sum(mask)

    Args:
        values: any shape, float32, bfloat16, float16 or float64.
        mask: broadcasts to values; bool, int or float, 0 where an entry does not count, else its weight, in the dtype of
            the result and not negative.
        axis: None for all, or a dimension or several to reduce, each once; negative ones count from the last.

    Returns:
        0-d, or values.shape without the reduced dimensions; float32 (float64 for float64). 0 where nothing counts.

    Raises:
        TypeError: values is not of a floating dtype, mask is complex or quantized, or a tensor is not dense. ValueError:
        mask does not broadcast to values, a device differs, or axis is not of values.

    Notes:
        Entries with mask 0 are never read into the result. float64 sums in a fixed order: same bits on every run.
        Differentiable once in `values`.

    Source: TRL 0.11.4, `masked_mean` (which divides by the sum of the mask before broadcasting, and gives NaN for an
    empty mask).
    """
    values, mask = _prepare("masked_mean", values, mask)
    axis = None if axis is None else _dimensions(values, axis)
    if not _native.available(values.device.type):
        return reference.masked_mean(values, mask, axis)
    rows, weights, shape = _rows(values, mask, axis)
    return _Moments.apply(rows, weights)[:, 1].reshape(shape)


def masked_var(values, mask, unbiased=True):
    """Variance over the tokens that count.

        masked_var = sum(mask * (values - masked_mean)^2) / n,   n = sum(mask),   times n / (n - 1) if unbiased

    Arguments, errors and determinism are those of `masked_mean`. 0 where nothing counts, and, if unbiased, for one token
    (for any n <= 1, which float masks may have).

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


def masked_whiten(values, mask, shift_mean=True):
    """Values brought to mean 0 (or their own mean) and variance 1 over the tokens that count.

        masked_whiten = (values - mean) / sqrt(var + 1e-8), plus mean if not shift_mean

    with the unbiased variance. Arguments and errors are those of `masked_mean`.

    Returns:
        values.shape, float32 (float64 for float64); 0 where the mask is 0. One counted token gives 0 (its value if not
        shift_mean).

    Source: TRL 0.11.4, `masked_whiten` (which also transforms masked entries and gives NaN for one token).
    """
    values, mask = _prepare("masked_whiten", values, mask)
    shift_mean = check.flag("masked_whiten", "shift_mean", shift_mean)
    if not _native.available(values.device.type):
        return reference.masked_whiten(values, mask, shift_mean)
    return _Whiten.apply(values.contiguous(), mask.to(values.dtype).contiguous(), shift_mean)
