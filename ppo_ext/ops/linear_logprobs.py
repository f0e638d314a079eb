"""Token log-probabilities, entropy and statistics from hidden states and the head's weights, without a tensor of logits.

The matrix products are torch's. They make a tile of logits at a time, some columns of the vocabulary for some rows, which
the compiled operators fold into a few numbers a row or turn into its gradient in place.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import _linear_tiles, _native, check, reference
from ._linear_checks import arithmetic, check_head, check_values
from ._sharded_linear import ShardedLinearLogprobs
from ._sharded_vocabulary import check_shard
from .check_labels import note

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? mask, Tensor? temperatures,"
    " float temperature, float logit_scale, float softcap"
)
_forward, _forward_name = _native.define(
    f"_linear_logprobs({_INPUTS}, bool with_entropy, bool with_statistics, Tensor(a!)? label_note)"
    " -> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_sum, Tensor log_sum_sq_probs,"
    " Tensor mean_logits, Tensor is_top1)"
)
_SAVED = (
    "Tensor? grad_logprobs, Tensor? grad_entropy, Tensor entropy, Tensor row_max, Tensor log_sum,"
    " bool needs_hidden, bool needs_weight, bool needs_bias"
)
_GRADS = "(Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
_backward, _backward_name = _native.define(f"_linear_logprobs_backward({_INPUTS}, {_SAVED}) -> {_GRADS}")
_shard_backward, _shard_backward_name = _native.define(
    f"_linear_logprobs_shard_backward({_INPUTS}, {_SAVED}) -> {_GRADS}"
)
_native.implement(_forward_name, _linear_tiles.forward)
_native.implement(_backward_name, _linear_tiles.backward)
_native.implement(_shard_backward_name, _linear_tiles.shard_backward)


@_native.register_fake(_forward_name)
def _(hidden, weight, labels, bias, mask, temperatures, temperature, scale, softcap, with_entropy, with_statistics, _):
    row = hidden.new_empty(labels.shape, dtype=arithmetic(hidden, weight))
    wanted = (True, with_entropy, True, True, *[with_statistics] * 3)
    return tuple(torch.empty_like(row) if want else row.new_empty(0) for want in wanted)


@_native.register_fake(_backward_name)
def _(hidden, weight, labels, bias, *rest):
    wanted = zip((hidden, weight, weight if bias is None else bias), rest[-3:])
    return tuple(x.new_empty(x.shape if need else 0) for x, need in wanted)


@_native.register_fake(_shard_backward_name)
def _(hidden, weight, labels, bias, *rest):
    wanted = zip((hidden.to(arithmetic(hidden, weight)), weight, weight if bias is None else bias), rest[-3:])
    return tuple(x.new_empty(x.shape if need else 0) for x, need in wanted)


class LinearStatistics(NamedTuple):
    """What `linear_statistics` returns: one number a token each, None where it was not asked for.

    logprobs, entropy: as in `linear_logprobs_and_entropy`, differentiable.
    log_sum_sq_probs: log sum_v p_v^2, the log-probability that two samples are the same token.
    mean_logits: the mean over the vocabulary of the logits, after the scale, the softcap and the temperature.
    is_top1: 1 where the label is the first of the largest logits, else 0; also 0 where the log-probability is NaN.
    """

    logprobs: torch.Tensor | None
    entropy: torch.Tensor | None
    log_sum_sq_probs: torch.Tensor | None
    mean_logits: torch.Tensor | None
    is_top1: torch.Tensor | None


_DETACHED = ("log_sum_sq_probs", "mean_logits", "is_top1")


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, mask, temperatures, numbers, with_entropy, with_statistics, noted):
        inputs = (hidden, weight, labels, bias, mask, temperatures)
        logprobs, entropy, row_max, log_sum, *others = _forward(*inputs, *numbers, with_entropy, with_statistics, noted)
        ctx.save_for_backward(*inputs, entropy, row_max, log_sum)
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)
        # what nobody asked for is no output: under torch.compile it would get a gradient of zeros all the same
        differentiable = (logprobs, entropy) if with_entropy else (logprobs,)
        if not with_statistics:
            return differentiable
        ctx.mark_non_differentiable(*others)
        return (*differentiable, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy=None, *_):
        *inputs, entropy, row_max, log_sum = ctx.saved_tensors
        if entropy.numel() == 0:  # then the second result is none of the entropy's
            grad_entropy = None
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 10
        grads = [None if grad is None else grad.contiguous() for grad in (grad_logprobs, grad_entropy)]
        needs = ctx.needs_input_grad[:3]
        found = _backward(*inputs, *ctx.numbers, *grads, entropy, row_max, log_sum, *needs)
        return *(grad if need else None for grad, need in zip(found, needs)), *(None,) * 7


def _prepare(op, hidden, weight, labels, bias, temperature, logit_scale, softcap, mask):
    """The arguments of the operators but for the flags, checked and in the forms that they take."""
    check_head(op, hidden, weight, bias)
    labels = check.labels(op, labels, hidden.shape[:-1], "hidden without its last dimension")
    check.device(op, "labels", labels, hidden.device, "hidden")
    if mask is not None:
        mask = check.mask(op, mask, labels.shape, hidden.device, "labels").contiguous()
    dtype = arithmetic(hidden, weight)
    temperature, temperatures = check.temperature(op, temperature, labels.shape, hidden.device, "labels", dtype)
    logit_scale = check.positive(op, "logit_scale", logit_scale)
    softcap = 0.0 if softcap is None else check.positive(op, "softcap", softcap, "be None or a positive finite number")
    return (hidden, weight, labels, bias, mask, temperatures), (temperature, logit_scale, softcap)


def _run(
    op, with_entropy, with_statistics, hidden, weight, labels, bias, temperature, logit_scale, softcap, mask, validate,
    group=None, vocab_start=None,
):  # fmt: skip
    """The results of the forward operator that were asked for, in its order."""
    tensors, numbers = _prepare(op, hidden, weight, labels, bias, temperature, logit_scale, softcap, mask)
    validate = check.flag(op, "validate", validate)
    shard = check_shard(op, group, vocab_start, hidden.device.type)
    if shard is not None:
        hidden, weight, labels, bias, *rest = tensors
        tensors = (hidden, weight, bias, labels, *rest)
        ops = (_forward, _shard_backward)
        return ShardedLinearLogprobs.apply(*tensors, numbers, with_entropy, with_statistics, op, ops, shard, validate)
    native = _native.available(hidden.device.type)
    if validate or not native:
        check_values(op, weight.shape[0], *tensors[2:3], *tensors[4:])
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None:
            check.no_tangent(op, name, x)
    if not native:
        return _reference(with_entropy, with_statistics, tensors, numbers)
    arguments = (*tensors, numbers, with_entropy, with_statistics, note(hidden.device))
    return check.naming(op, _apply, *arguments)


def _reference(with_entropy, with_statistics, tensors, numbers):
    hidden, weight, labels, bias, mask, temperatures = tensors
    temperature, logit_scale, softcap = numbers
    found = reference.linear_statistics(
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=temperature if temperatures is None else temperatures,
        logit_scale=logit_scale,
        softcap=softcap or None,
        mask=mask,
    )
    return (*found[: 1 + with_entropy], *(found[2:] if with_statistics else ()))


def _apply(hidden, weight, labels, bias, mask, temperatures, numbers, with_entropy, with_statistics, noted):
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        return _LinearLogprobs.apply(
            hidden, weight, bias, labels, mask, temperatures, numbers, with_entropy, with_statistics, noted
        )
    plain = (hidden.detach(), weight.detach(), labels, None if bias is None else bias.detach(), mask, temperatures)
    found = _forward(*plain, *numbers, with_entropy, with_statistics, noted)
    return (*found[: 1 + with_entropy], *(found[4:] if with_statistics else ()))


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    validate: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
) -> torch.Tensor:
    """Log-probability of each label, straight from what the language model's head reads: no tensor of all logits exists.

        x[n, v] = hidden[n] . weight[v] + bias[v]
        z[n, v] = logit_scale * x[n, v],   or  softcap * tanh(logit_scale * x[n, v] / softcap)  with a softcap
        logprobs[n] = z[n, y_n] / temperature - log sum_v exp(z[n, v] / temperature)

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64, of any strides.
        weight: [V, H], the head's weight, of any strides and any of these dtypes. Half precision is multiplied exactly
            and added in float32, also if the dtypes of hidden and weight differ, and under autocast too.
        labels: [...] int64 or int32, the token ids y_n, not shifted. Rows without one are left out by the mask.
        bias: [V], any of these dtypes. An entry of -inf bars a token.
        temperature: a number in [1e-30, 1e30], or a tensor [...] of such numbers, one a token. It gets no gradient.
        logit_scale, softcap: positive numbers, as in the config of the model (`logit_scale`, `final_logit_softcapping`).
        mask: [...] bool, int or float, nonzero where a token counts; None counts all. The other rows are left out of
            the products, and never read: their result and their gradients are 0. On CUDA the host waits once for the
            number of the rows that count, except while a CUDA graph is captured: then zeros are multiplied in their
            place.
        validate: on CUDA, check ids and temperatures before anything is computed, for which the host waits for the
            device. On the CPU they are always checked.
        group, vocab_start: for weight and bias that are a shard of the head, as in tensor parallelism, see `logprobs`:
            the rows of the ids from vocab_start on. The gradient of hidden is that of all shards, by one all_reduce;
            those of weight and bias are the shard's.

    Returns:
        [...] float32 (float64 if hidden or weight is), differentiable once with respect to hidden, weight and bias.
        Only the gradients that are needed are computed: a frozen head costs no product for its weight.

    Raises:
        TypeError: a type or dtype is not one of those above, or a tensor is not dense; so for DTensors and quantized
            weights.
        ValueError: shapes or devices do not match, a number is out of its range, or, on the CPU or with `validate`, a
            label that counts is outside [0, V), -100 for example. Without `validate`, such a row is NaN on CUDA, its
            gradient is 0, and the next `check_labels` raises the error.
        NotImplementedError: hidden, weight or bias carry a forward-mode tangent.

    Notes:
        Memory beyond inputs and results: one tile of logits, at most 16 MB on a CPU, and in the backward pass the
        gradient of hidden in float32. The gradient of the weight is written once, part by part, without another copy of
        its size. The backward pass computes the logits again: four matrix products for both passes, three if the
        weight is frozen.
        On a CPU with Linux, the memory of a large gradient that is gone is kept for the next one; the system takes it back
        when memory runs short.
        The tiles follow from the shapes alone, so the bits are the same on every run with the same number of threads.
        -inf, NaN and empty input are as in `logprobs`.
    """
    return _run(
        "linear_logprobs",
        False,
        False,
        hidden,
        weight,
        labels,
        bias,
        temperature,
        logit_scale,
        softcap,
        mask,
        validate,
        group,
        vocab_start,
    )[0]


def linear_logprobs_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    validate: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy of each token's distribution, straight from what the head reads.

        entropy[n] = -sum_v p_nv log p_nv,   p_n = softmax(z[n] / temperature),   0 log 0 = 0

    Arguments, errors, masked rows, precision and memory are those of `linear_logprobs`.

    Returns:
        (logprobs, entropy), both [...] float32 (float64 if hidden or weight is), both differentiable once with respect
        to hidden, weight and bias, at the cost of no further matrix product.
    """
    logprobs, entropy = _run(
        "linear_logprobs_and_entropy",
        True,
        False,
        hidden,
        weight,
        labels,
        bias,
        temperature,
        logit_scale,
        softcap,
        mask,
        validate,
        group,
        vocab_start,
    )
    return logprobs, entropy


def _wanted(op: str, outputs: Any) -> tuple[str, ...]:
    names = LinearStatistics._fields
    if isinstance(outputs, str) or not isinstance(outputs, (tuple, list, set, frozenset)):
        check.fail(op, "outputs", "be a tuple of names", type(outputs).__name__, TypeError)
    for name in outputs:
        if name not in names:
            check.fail(op, "outputs", f"be names out of {', '.join(names)}", repr(name))
    return tuple(outputs)


def linear_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    outputs: tuple[str, ...] = LinearStatistics._fields,
    validate: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
) -> LinearStatistics:
    """Log-probability, entropy and, without gradient, log sum of squared probabilities, mean logit and top-1 hit.

        log_sum_sq_probs[n] = log sum_v p_nv^2,   mean_logits[n] = mean_v z[n, v] / temperature
        is_top1[n] = 1 where y_n is the first id with the largest z[n, v], else 0: a tie with an earlier id is not top

    The other arguments, errors, masked rows, precision and memory are those of `linear_logprobs`.

    Args:
        outputs: the names of what is wanted; by default everything. The rest is None and costs nothing.
        group, vocab_start: as in `linear_logprobs`; the same outputs on all processes. Rows of padding, whose bias is -inf,
            count in mean_logits.

    Returns:
        LinearStatistics(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), each [...] float32 (float64 if
        hidden or weight is). logprobs and entropy are differentiable as in `linear_logprobs_and_entropy`.
    """
    wanted = _wanted("linear_statistics", outputs)
    with_entropy, with_statistics = "entropy" in wanted, any(name in wanted for name in _DETACHED)
    found = _run(
        "linear_statistics",
        with_entropy,
        with_statistics,
        hidden,
        weight,
        labels,
        bias,
        temperature,
        logit_scale,
        softcap,
        mask,
        validate,
        group,
        vocab_start,
    )
    names = ("logprobs", *(("entropy",) * with_entropy), *(_DETACHED if with_statistics else ()))
    results = dict(zip(names, found, strict=True))
    return LinearStatistics(**{name: results[name] if name in wanted else None for name in LinearStatistics._fields})
