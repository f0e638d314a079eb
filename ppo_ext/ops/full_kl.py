"""The KL divergence of the policy from the reference at each token, summed over the whole vocabulary."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _native, check, reference
from ._groups import check_group
from ._sharded_kl import ShardedKL
from ._sharded_vocabulary import require_native
from .logprobs import _forward as logprobs_forward

_forward, _forward_name = _native.define(
    "_full_kl(Tensor logits, Tensor ref_logits, Tensor? mask, Tensor? temperatures, float temperature)"
    " -> (Tensor kl, Tensor row_max, Tensor row_sum, Tensor ref_at_max, Tensor mean_gap)"
)
_GRADIENT_ARGUMENTS = (
    "Tensor ref_logits, Tensor grad_kl, Tensor? mask, Tensor row_max, Tensor row_sum, Tensor ref_at_max,"
    " Tensor mean_gap, Tensor? temperatures, float temperature"
)
_backward, _backward_name = _native.define(f"_full_kl_backward(Tensor logits, {_GRADIENT_ARGUMENTS}) -> Tensor")
_backward_inplace, _backward_inplace_name = _native.define(
    f"_full_kl_backward_(Tensor(a!) logits, {_GRADIENT_ARGUMENTS}) -> ()"
)


@_native.register_fake(_forward_name)
def _(logits, ref_logits, mask, temperatures, temperature):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    row = logits.new_empty(logits.shape[:-1], dtype=dtype)
    return (row, *(torch.empty_like(row) for _ in range(4)))


@_native.register_fake(_backward_name)
def _(logits, *_):
    return logits.new_empty(logits.shape)


@_native.register_fake(_backward_inplace_name)
def _(logits, *_):
    return None


class _FullKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, mask, temperatures, temperature, inplace_backward):
        inputs = (logits, ref_logits, mask, temperatures)
        kl, *row_stats = _forward(*inputs, temperature)
        ctx.save_for_backward(*inputs, *row_stats)
        ctx.temperature, ctx.inplace_backward = temperature, inplace_backward
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_kl):
        logits, ref_logits, mask, temperatures, *saved = ctx.saved_tensors
        arguments = (ref_logits, grad_kl.contiguous(), mask, *saved, temperatures, ctx.temperature)
        if not ctx.inplace_backward or torch.compiler.is_compiling() or not check.overwritable(logits, ref_logits):
            return _backward(logits, *arguments), *(None,) * 5
        _backward_inplace(logits, *arguments)
        torch.autograd.graph.increment_version(logits)
        return logits, *(None,) * 5


def full_kl(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    inplace_backward: bool = False,
    group: Any = None,
) -> torch.Tensor:
    """KL divergence of the policy from the reference at each token, over the whole vocabulary.

        full_kl[n] = sum_v p_nv (log p_nv - log q_nv),   p = softmax(logits / temperature), q of ref_logits

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, of any strides; they are not copied.
        ref_logits: [..., V], of the dtype and on the device of logits, of any strides. They receive no gradient.
        temperature: a number in [1e-30, 1e30] that divides both, or a float tensor [...] with one for each token. It
            receives no gradient. Outside of that range, a token is an error on the CPU and NaN on CUDA.
        mask: [...] bool, int or float, nonzero where a token counts; None counts all. The other rows are not read;
            their result and their gradient are 0.
        inplace_backward: let the backward pass write the gradient over `logits`, see `logprobs`.
        group: a torch.distributed.ProcessGroup, of which each process has other columns of both, and all rows; see
            `logprobs`. The reference is read once more then.

    Returns:
        [...] float32 (float64 for float64 logits), differentiable once with respect to `logits`.

    Raises:
        TypeError: a type or dtype is not one of those above, a tensor is not dense, or the dtypes of logits and
            ref_logits differ.
        ValueError: shapes or devices do not match, temperature is out of its range, or more than 8 leading dimensions
            cannot be merged.
        NotImplementedError: the logits carry a forward-mode tangent.

    Notes:
        0 log 0 = 0: an entry that has no probability under the policy adds nothing. An entry that has probability under
        the policy and none under the reference makes the result of its row +inf. Empty input gives an empty result.
        The two may differ in scale or in a common offset: neither loses precision by the other. A row whose
        probability is all at one entry has a gradient of exactly 0.
        Both logits are read once in the forward and once in the backward pass. Sums run in float32 in a fixed order:
        same bits on every run and for any number of threads.

    Source: TRL 0.11.4, `PPOTrainer._kl_penalty` with kl_penalty="full".
    """
    check.floating("full_kl", "logits", logits)
    check.floating("full_kl", "ref_logits", ref_logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        check.fail("full_kl", "logits", "have the shape [..., V] with V >= 1", list(logits.shape))
    check.shape("full_kl", "ref_logits", ref_logits, logits.shape, "logits")
    check.device("full_kl", "ref_logits", ref_logits, logits.device, "logits")
    if ref_logits.dtype != logits.dtype:
        check.fail("full_kl", "ref_logits", f"have the dtype {logits.dtype} of logits", ref_logits.dtype, TypeError)
    tokens = "logits without its last dimension"
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    temperature, temperatures = check.temperature(
        "full_kl", temperature, logits.shape[:-1], logits.device, tokens, dtype
    )
    inplace_backward = check.flag("full_kl", "inplace_backward", inplace_backward)
    if mask is not None:
        mask = check.mask("full_kl", mask, logits.shape[:-1], logits.device, tokens)
        mask = mask.contiguous()
    ref_logits = ref_logits.detach()
    check_group("full_kl", group)
    if group is not None:
        require_native("full_kl", logits.device.type)
        operators = (_forward, _backward, _backward_inplace, logprobs_forward)
        options = (mask, temperatures, temperature, inplace_backward)
        return ShardedKL.apply(logits, ref_logits, *options, operators, group)
    if not _native.available(logits.device.type):
        if temperatures is not None:
            check.temperatures("full_kl", temperatures, mask)
        either = temperature if temperatures is None else temperatures
        return reference.full_kl(logits, ref_logits, temperature=either, mask=mask)
    check.no_tangent("full_kl", "logits", logits)
    arguments = (ref_logits, mask, temperatures, temperature)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _FullKL.apply(logits, *arguments, inplace_backward)
    return _forward(logits.detach(), *arguments)[0]
