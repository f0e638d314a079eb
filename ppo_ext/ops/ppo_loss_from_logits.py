"""PPO's loss of a minibatch from its logits, which are read once forward and once backward."""

import torch
from torch.autograd.function import once_differentiable

from . import _native, _ppo_tokens, check, reference
from .check_labels import note
from .logprobs import _backward as _grad_logits
from .logprobs import _backward_inplace as _grad_logits_inplace
from .logprobs import _forward as _logprobs
from .logprobs import _prepare as _prepare_logits

_OP = "ppo_loss_from_logits"
_BLOCK = 1 << 22  # bytes of logits that are still in a CPU's cache when their gradient is written over them


class _PPOLossFromLogits(torch.autograd.Function):
    """The loss; the backward pass reads the logits again, for their gradient."""

    @staticmethod
    def forward(ctx, logits, vpreds, loss, rows, row_grads, grad_vpreds, temperature, inplace_backward):
        ctx.save_for_backward(logits, *rows, *row_grads, grad_vpreds)
        ctx.temperature, ctx.inplace_backward = temperature, inplace_backward
        return loss.view_as(loss) if torch.compiler.is_compiling() else loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        logits, *rows, grad_logprobs, grad_entropy, grad_vpreds = ctx.saved_tensors
        grads = [None if x is None else _ppo_tokens.product(x, grad_loss) for x in (grad_logprobs, grad_entropy)]
        grad_vpreds = _ppo_tokens.product(grad_vpreds, grad_loss) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_vpreds, *(None,) * 6
        arguments = (*grads, *rows, ctx.temperature)
        if not ctx.inplace_backward or torch.compiler.is_compiling() or not check.overwritable(logits):
            return _grad_logits(logits, *arguments), grad_vpreds, *(None,) * 6
        _grad_logits_inplace(logits, *arguments)
        torch.autograd.graph.increment_version(logits)
        return logits, grad_vpreds, *(None,) * 6


class _GradientInForward(torch.autograd.Function):
    """The loss, where the gradient is in the memory of the logits already."""

    @staticmethod
    def forward(ctx, logits, vpreds, loss, grad_vpreds):
        ctx.save_for_backward(grad_vpreds)
        ctx.gradient = logits.detach()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grads = (ctx.gradient, *ctx.saved_tensors)
        needed = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad)]
        return *_ppo_tokens.times(needed, grad_loss), None, None


# ---- forward --------------------------------------------------------------------------------------------------------


def _forward(logits, labels, mask, temperatures, temperature, noted, tokens, numbers):
    """The results, what the gradient of the logits needs of each row, and the gradients of the log-probabilities and
    entropies."""
    logprobs, entropy, *saved = _logprobs(logits, labels, mask, temperatures, temperature, True, noted)
    found, grad_logprobs = _ppo_tokens.whole_loss(logprobs, entropy, tokens, mask, numbers)
    grad_entropy = _ppo_tokens.entropy_gradients(logprobs, mask, numbers[-1], _ppo_tokens.share_of(mask))
    if grad_entropy is not None:
        grad_entropy = torch.where(_ppo_tokens.skipped(found.stats), 0, grad_entropy)
    return found, (labels, mask, entropy, *saved, temperatures), (grad_logprobs, grad_entropy)


def _forward_inplace(logits, labels, mask, temperatures, temperature, noted, tokens, numbers):
    """The results, after the gradient has been written over the logits, some rows at a time."""
    share, results = _ppo_tokens.share_of(mask), []
    for part, labels_, mask_, temperatures_, *tokens_ in _blocks(logits, labels, mask, temperatures, *tokens):
        logprobs, entropy, *saved = _logprobs(part, labels_, mask_, temperatures_, temperature, True, noted)
        grads = _ppo_tokens.row_gradients(logprobs, tokens_, mask_, numbers, share)
        _grad_logits_inplace(part, *grads, labels_, mask_, entropy, *saved, temperatures_, temperature)
        results.append((logprobs, entropy))
    logprobs, entropy = (torch.cat(x).view(labels.shape) if len(x) > 1 else x[0] for x in zip(*results))
    found, _ = _ppo_tokens.whole_loss(logprobs, entropy, tokens, mask, numbers)
    _ppo_tokens.zero_if_skipped(found.stats, [logits], numbers)
    torch.autograd.graph.increment_version(logits)
    return found


def _blocks(logits, *rest):
    """The arguments, on a CPU some rows at a time where rows of the logits can be counted without a copy of them."""
    count = rest[0].numel()
    rows = max(1, _BLOCK // (logits.shape[-1] * logits.element_size()))
    if logits.device.type != "cpu" or count <= rows:
        return [(logits, *rest)]
    try:
        flat = (logits.view(-1, logits.shape[-1]), *(None if x is None else x.flatten() for x in rest))
    except RuntimeError:
        return [(logits, *rest)]
    return [tuple(None if x is None else x[i : i + rows] for x in flat) for i in range(0, count, rows)]


def _apply(logits, labels, mask, temperatures, temperature, noted, tokens, numbers, inplace_forward, inplace_backward):
    plain = (logits.detach(), labels, mask, temperatures, temperature, noted, [x.detach() for x in tokens], numbers)
    vpreds = tokens[2]
    needed = torch.is_grad_enabled() and (logits.requires_grad or vpreds.requires_grad)
    inplace_forward = inplace_forward and needed and not torch.compiler.is_compiling() and check.overwritable(logits)
    if inplace_forward and logits.requires_grad:
        found = _forward_inplace(*plain)
        loss = _GradientInForward.apply(logits, vpreds, found.loss, found.grad_vpreds)
    else:
        found, rows, row_grads = _forward(*plain)
        loss = found.loss
        if needed:
            loss = _PPOLossFromLogits.apply(
                logits, vpreds, loss, rows, row_grads, found.grad_vpreds, temperature, inplace_backward
            )
    return loss, _ppo_tokens.named_stats(found)


# ---- the op ---------------------------------------------------------------------------------------------------------


def ppo_loss_from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    vpreds: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    ratio_threshold: float = float("inf"),
    entropy_coef: float = 0.0,
    inplace_forward: bool = False,
    inplace_backward: bool = False,
    validate: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The whole PPO loss of a minibatch from its logits, which are read once forward and once backward.

        logprobs, entropy = logprobs_and_entropy(logits, labels, ...)
        loss = ppo_loss(logprobs, old_logprobs, advantages, vpreds, values, returns, mask, ...)
               - entropy_coef * masked_mean(entropy, mask)

    Args:
        logits, labels, temperature, inplace_backward, validate: as in `logprobs_and_entropy`.
        old_logprobs, advantages, vpreds, values, returns: of the labels' shape, as in `ppo_loss`.
        mask: of the labels' shape, bool, int or float, nonzero where a token counts. The logits of the others are not
            read.
        cliprange, cliprange_value, vf_coef, ratio_threshold: as in `ppo_loss`.
        entropy_coef: weight of the entropy bonus, finite in float32. Where the ratio guard skips the minibatch, the
            bonus is 0 too.
        inplace_forward: let the forward pass write the gradient over `logits`, while a few rows of them are in a CPU's
            cache; the backward pass multiplies it by the gradient of the loss, which costs nothing on a CPU where that
            is 1. In half precision the gradient is rounded before it is multiplied. If autograd uses the overwritten
            logits later, it raises an error. Without effect where logits need no gradient, under torch.compile, and for
            logits whose entries share memory.

    Returns:
        (loss, stats) as `ppo_loss` returns them, differentiable once with respect to logits and vpreds, and in stats
        also policy/entropy, the mean entropy of the tokens that count. loss/total includes the bonus.

    Raises:
        The errors of `logprobs` and `ppo_loss`.

    Notes:
        Masked rows, precision and determinism are those of `logprobs` and `ppo_loss`. If no token counts, loss, gradients
        and statistics are 0.
    """
    labels, _, temperatures, temperature = _prepare_logits(_OP, logits, labels, temperature, None)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    given = (old_logprobs, advantages, vpreds, values, returns)
    tokens, mask = _ppo_tokens.prepare(_OP, labels, given, mask, dtype)
    numbers = _ppo_tokens.numbers(_OP, cliprange, cliprange_value, vf_coef, ratio_threshold, entropy_coef)
    inplace_forward = check.flag(_OP, "inplace_forward", inplace_forward)
    inplace_backward = check.flag(_OP, "inplace_backward", inplace_backward)
    validate = check.flag(_OP, "validate", validate)
    check.no_tangent(_OP, "logits", logits)
    native = _native.available(logits.device.type)
    if validate or not native:
        check.ids(_OP, labels, logits.shape[-1], mask)
        if temperatures is not None:
            check.temperatures(_OP, temperatures, mask)
    if not native:
        either = temperature if temperatures is None else temperatures
        options = dict(zip(_ppo_tokens.COEFFICIENTS, numbers), temperature=either)
        named = dict(zip(_ppo_tokens.TOKENS, tokens), mask=mask)
        return reference.ppo_loss_from_logits(logits, labels, **named, **options)
    arguments = (logits, labels, mask, temperatures, temperature, note(logits.device), tokens, numbers)
    return check.naming(_OP, _apply, *arguments, inplace_forward, inplace_backward)
