"""Token log-probabilities, and the entropy of each token's distribution, from logits in one pass."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _native, check, reference
from ._sharded_vocabulary import ShardedLogprobs, check_shard
from .check_labels import note

_forward, _forward_name = _native.define(
    "_logprobs(Tensor logits, Tensor labels, Tensor? mask, Tensor? temperatures, float temperature, bool with_entropy,"
    " Tensor(a!)? label_note) -> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_sum)"
)
_GRADIENT_ARGUMENTS = (
    "Tensor? grad_logprobs, Tensor? grad_entropy, Tensor labels, Tensor? mask, Tensor entropy,"
    " Tensor row_max, Tensor log_sum, Tensor? temperatures, float temperature"
)
_backward, _backward_name = _native.define(f"_logprobs_backward(Tensor logits, {_GRADIENT_ARGUMENTS}) -> Tensor")
_backward_inplace, _backward_inplace_name = _native.define(
    f"_logprobs_backward_(Tensor(a!) logits, {_GRADIENT_ARGUMENTS}) -> ()"
)


@_native.register_fake(_forward_name)
def _(logits, labels, mask, temperatures, temperature, with_entropy, label_note):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    row = logits.new_empty(labels.shape, dtype=dtype)
    return (
        row,
        torch.empty_like(row) if with_entropy else row.new_empty(0),
        torch.empty_like(row),
        torch.empty_like(row),
    )


@_native.register_fake(_backward_name)
def _(logits, *_):
    return logits.new_empty(logits.shape)


@_native.register_fake(_backward_inplace_name)
def _(logits, *_):
    return None


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, mask, temperatures, temperature, with_entropy, label_note, inplace_backward):
        inputs = (logits, labels, mask, temperatures)
        logprobs, entropy, row_max, log_sum = _forward(*inputs, temperature, with_entropy, label_note)
        ctx.save_for_backward(*inputs, entropy, row_max, log_sum)
        ctx.temperature, ctx.inplace_backward = temperature, inplace_backward
        ctx.set_materialize_grads(False)
        # without entropy it is no output: under torch.compile an output that nothing reads still gets a gradient of zeros
        return (logprobs, entropy) if with_entropy else logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy=None):
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 8
        logits, labels, mask, temperatures, entropy, row_max, log_sum = ctx.saved_tensors
        arguments = (
            None if grad_logprobs is None else grad_logprobs.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            labels,
            mask,
            entropy,
            row_max,
            log_sum,
            temperatures,
            ctx.temperature,
        )
        if not ctx.inplace_backward or torch.compiler.is_compiling() or not check.overwritable(logits):
            return _backward(logits, *arguments), *(None,) * 7
        _backward_inplace(logits, *arguments)
        torch.autograd.graph.increment_version(logits)
        return logits, *(None,) * 7


def _prepare(op, logits, labels, temperature, mask):
    check.floating(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        check.fail(op, "logits", "have the shape [..., V] with V >= 1", list(logits.shape))
    labels = check.labels(op, labels, logits.shape[:-1], "logits without its last dimension")
    check.device(op, "labels", labels, logits.device, "logits")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    temperature, temperatures = check.temperature(op, temperature, labels.shape, logits.device, "labels", dtype)
    if mask is not None:
        mask = check.mask(op, mask, labels.shape, logits.device, "labels").contiguous()
    return labels, mask, temperatures, temperature


def _run(op, logits, labels, temperature, mask, with_entropy, inplace_backward, validate, group, vocab_start):
    labels, mask, temperatures, temperature = _prepare(op, logits, labels, temperature, mask)
    inplace_backward = check.flag(op, "inplace_backward", inplace_backward)
    validate = check.flag(op, "validate", validate)
    shard = check_shard(op, group, vocab_start, logits.device.type)
    if shard is not None:
        arguments = (mask, temperatures, temperature, with_entropy, inplace_backward)
        operators = (_forward, _backward, _backward_inplace)
        results = ShardedLogprobs.apply(logits, labels, *arguments, op, operators, shard, validate)
        return results if with_entropy else (results,)
    native = _native.available(logits.device.type)
    if validate or not native:
        check.ids(op, labels, logits.shape[-1], mask)
        if temperatures is not None:
            check.temperatures(op, temperatures, mask)
    if not native:
        either = temperature if temperatures is None else temperatures
        return reference.logprobs_and_entropy(logits, labels, temperature=either, mask=mask)
    check.no_tangent(op, "logits", logits)
    arguments = (logits, labels, mask, temperatures, temperature, with_entropy, note(logits.device))
    return check.naming(op, _apply, *arguments, inplace_backward)


def _apply(logits, labels, mask, temperatures, temperature, with_entropy, label_note, inplace_backward):
    arguments = (labels, mask, temperatures, temperature, with_entropy, label_note)
    if torch.is_grad_enabled() and logits.requires_grad:
        result = _Logprobs.apply(logits, *arguments, inplace_backward)
        return result if with_entropy else (result,)
    return _forward(logits.detach() if logits.requires_grad else logits, *arguments)[:2]


def logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    inplace_backward: bool = False,
    validate: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
) -> torch.Tensor:
    """Log-probability of each label under the softmax of its row of logits.

        logprobs[n] = logits[n, y_n] / temperature - log sum_v exp(logits[n, v] / temperature)

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, of any strides; they are not copied.
        labels: [...] int64 or int32, the token ids y_n. They are not shifted: for the log-probability of the next
            token, pass labels that are one step ahead of the logits.
        temperature: a number in [1e-30, 1e30] that divides the logits, or a float tensor [...] with one for each token.
            It receives no gradient.
        mask: [...] bool, int or float, nonzero where a token counts; None counts all. The other rows are not read:
            their result and their gradient are 0, whatever their logits and labels are.
        inplace_backward: let the backward pass write the gradient over `logits`, which saves one buffer of their size.
            The forward pass never changes them. If autograd uses the overwritten logits later, it raises an error.
            Without effect under torch.compile, and for logits whose entries share memory, as those of an expanded
            tensor do.
        validate: on CUDA, check the ids and temperatures before anything is computed, for which the host waits for the
            device. On the CPU they are always checked.
        group, vocab_start: for logits that are a shard of the vocabulary, as in tensor parallelism: a
            torch.distributed.ProcessGroup, of which each process has all rows, the same labels, and the columns of the
            ids from its vocab_start on; as many as it likes, and -inf in columns that pad. One all_gather of four
            numbers a row gives all processes the same bits; the backward pass has no collective, and its gradient is
            that of the shard. On CUDA and under torch.compile an id that is in no shard gives NaN; `validate` refuses it.

    Returns:
        [...] float32 (float64 for float64 logits), differentiable once with respect to `logits`.

    Raises:
        TypeError: a type or dtype is not one of those above, or a tensor is not dense.
        ValueError: shapes or devices do not match, temperature is out of its range, more than 8 leading dimensions of
            the logits cannot be merged, or, on the CPU or with `validate`, a label that counts is outside [0, V) or its
            temperature out of range. Without `validate`, a row with such a label is NaN on CUDA, its gradient is 0, and
            the next `check_labels` raises the error; a row with such a temperature is NaN, and its gradient too.
        NotImplementedError: the logits carry a forward-mode tangent.

    Notes:
        Sums run in float32 in a fixed order: same bits on every run, for any number of threads, and however the rows
        are divided into batches. As in torch, a row with a NaN or +inf, or of nothing but -inf, gives NaN; any other
        -inf is probability 0. Empty input gives an empty result. Saved for the backward pass: the logits themselves and
        two numbers a row.

    Source: TRL 0.11.4, `logprobs_from_logits`.
    """
    return _run("logprobs", logits, labels, temperature, mask, False, inplace_backward, validate, group, vocab_start)[0]


def logprobs_and_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    inplace_backward: bool = False,
    validate: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label and entropy of each row, from one read of the logits.

        entropy[n] = -sum_v p_nv log p_nv,   p_n = softmax(logits[n] / temperature),   0 log 0 = 0

    Arguments, errors, masked rows, precision and determinism are those of `logprobs`.

    Returns:
        (logprobs, entropy), both [...] float32 (float64 for float64 logits), both differentiable once with respect to
        `logits`. The backward pass computes both gradients in one pass over the logits.

    Source: TRL 0.11.4, `logprobs_from_logits` and `entropy_from_logits` (which gives NaN when a logit is -inf).
    """
    return _run(
        "logprobs_and_entropy", logits, labels, temperature, mask, True, inplace_backward, validate, group, vocab_start
    )
