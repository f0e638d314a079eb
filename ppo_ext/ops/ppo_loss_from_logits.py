"""PPO's loss of a minibatch from its logits, which are read once forward and once backward."""

import torch
from torch.autograd.function import once_differentiable

from . import _native, _ppo_tokens, check, reference
from ._ppo_options import Aggregation, KLEstimator, KLGradient, PolicyLoss, RatioLevel, ValueLoss
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


def _forward(logits, labels, temperatures, temperature, noted, tokens):
    """The results, what the gradient of the logits needs of each row, and the gradients of the log-probabilities and
    entropies."""
    mask = tokens.mask
    logprobs, entropy, *saved = _logprobs(logits, labels, mask, temperatures, temperature, True, noted)
    found, row_grads = _ppo_tokens.whole_loss(logprobs, entropy, tokens)
    return found, (labels, mask, entropy, *saved, temperatures), row_grads


def _forward_inplace(logits, labels, temperatures, temperature, noted, tokens):
    """The results, after the gradient has been written over the logits, some rows at a time where a row's gradient needs
    no other."""
    if _ppo_tokens.by_sequence(tokens):
        found, rows, row_grads = _forward(logits, labels, temperatures, temperature, noted, tokens)
        _grad_logits_inplace(logits, *row_grads, *rows, temperature)
        torch.autograd.graph.increment_version(logits)
        return found
    share, results = _ppo_tokens.shares(tokens), []
    for part, (labels_, temperatures_, share_), tokens_ in _blocks(logits, (labels, temperatures, share), tokens):
        mask = tokens_.mask
        logprobs, entropy, *saved = _logprobs(part, labels_, mask, temperatures_, temperature, True, noted)
        grads = _ppo_tokens.row_gradients(logprobs, tokens_, share_)
        _grad_logits_inplace(part, *grads, labels_, mask, entropy, *saved, temperatures_, temperature)
        results.append((logprobs, entropy))
    logprobs, entropy = (torch.cat(x).view(labels.shape) if len(x) > 1 else x[0] for x in zip(*results))
    found, _ = _ppo_tokens.whole_loss(logprobs, entropy, tokens)
    _ppo_tokens.zero_if_skipped(found.stats, [logits], tokens)
    torch.autograd.graph.increment_version(logits)
    return found


def _blocks(logits, others, tokens):
    """The arguments, on a CPU some rows at a time where rows of the logits can be counted without a copy of them."""
    count = tokens.mask.numel()
    rows = max(1, _BLOCK // (logits.shape[-1] * logits.element_size()))
    if logits.device.type != "cpu" or count <= rows:
        return [(logits, others, tokens)]
    try:
        flat = logits.view(-1, logits.shape[-1])
    except RuntimeError:
        return [(logits, others, tokens)]
    blocks = []
    for first in range(0, count, rows):

        def of_block(x, first=first):
            return None if x is None else x.flatten()[first : first + rows]

        blocks.append((flat[first : first + rows], [of_block(x) for x in others], tokens.of_rows(of_block)))
    return blocks


def _apply(logits, labels, temperatures, temperature, noted, tokens, names, inplace_forward, inplace_backward):
    vpreds, tokens = tokens.vpreds, tokens.of_rows(torch.Tensor.detach)
    plain = (logits.detach(), labels, temperatures, temperature, noted, tokens)
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (logits, vpreds))
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
    return loss, _ppo_tokens.named_stats(found, names)


# ---- the op ---------------------------------------------------------------------------------------------------------


def ppo_loss_from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    vpreds: torch.Tensor | None,
    values: torch.Tensor | None,
    returns: torch.Tensor | None,
    mask: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    cliprange: float | tuple[float, float] = 0.2,
    cliprange_value: float | None = 0.2,
    vf_coef: float = 0.1,
    ratio_threshold: float = float("inf"),
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    ratio_level: RatioLevel = "token",
    policy_loss: PolicyLoss = "clip",
    weights: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k1",
    kl_gradient: KLGradient = "exact",
    entropy_coef: float = 0.0,
    value_loss: ValueLoss = "mse",
    huber_delta: float = 10.0,
    aggregation: Aggregation = "token_mean",
    norm_length: float | None = None,
    denominator: float | torch.Tensor | None = None,
    scale: float = 1.0,
    row_counts: torch.Tensor | None = None,
    inplace_forward: bool = False,
    inplace_backward: bool = False,
    validate: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The whole PPO loss of a minibatch from its logits, which are read once forward and once backward.

        logprobs, entropy = logprobs_and_entropy(logits, labels, ...)
        loss = ppo_loss(logprobs, old_logprobs, advantages, vpreds, values, returns, mask, entropy=entropy, ...)

    Args:
        logits, labels, temperature, inplace_backward, validate: as in `logprobs_and_entropy`.
        old_logprobs, advantages, vpreds, values, returns: as in `ppo_loss`, of the labels' shape.
        mask: of the labels' shape, bool, int or float, nonzero where a token counts. The logits of the others are not
            read.
        all others: as in `ppo_loss`, of the labels' shape where they have a number for each token.
        inplace_forward: let the forward pass write the gradient over `logits`, while a few rows of them are in a CPU's
            cache; the backward pass multiplies it by the gradient of the loss, which costs nothing on a CPU where that
            is 1. In half precision the gradient is rounded before it is multiplied. If autograd uses the overwritten
            logits later, it raises an error. Without effect where logits need no gradient, under torch.compile, and for
            logits whose entries share memory. With ratios of sequences, whose gradients are known after the last token,
            all logits are read before the first is overwritten.

    Returns:
        (loss, stats) as `ppo_loss` with options and an entropy returns them, differentiable once with respect to logits
        and vpreds.

    Raises:
        The errors of `logprobs` and `ppo_loss`.

    Notes:
        Masked rows, precision and determinism are those of `logprobs` and `ppo_loss`. If no token counts, loss, gradients
        and statistics are 0.
    """
    given = {
        "logits": logits,
        "labels": labels,
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "vpreds": vpreds,
        "values": values,
        "returns": returns,
        "mask": mask,
        "temperature": temperature,
        "cliprange": cliprange,
        "cliprange_value": cliprange_value,
        "vf_coef": vf_coef,
        "ratio_threshold": ratio_threshold,
        "dual_clip": dual_clip,
        "log_ratio_clamp": log_ratio_clamp,
        "ratio_level": ratio_level,
        "policy_loss": policy_loss,
        "weights": weights,
        "ref_logprobs": ref_logprobs,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
        "kl_gradient": kl_gradient,
        "entropy_coef": entropy_coef,
        "value_loss": value_loss,
        "huber_delta": huber_delta,
        "aggregation": aggregation,
        "norm_length": norm_length,
        "denominator": denominator,
        "scale": scale,
        "row_counts": row_counts,
        "inplace_forward": inplace_forward,
        "inplace_backward": inplace_backward,
        "validate": validate,
    }
    labels, _, temperatures, temperature = _prepare_logits(_OP, logits, labels, temperature, None)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tokens, names = _ppo_tokens.prepare(_OP, given, labels, dtype)
    inplace_forward = check.flag(_OP, "inplace_forward", given.pop("inplace_forward"))
    inplace_backward = check.flag(_OP, "inplace_backward", given.pop("inplace_backward"))
    validate = check.flag(_OP, "validate", given.pop("validate"))
    check.no_tangent(_OP, "logits", logits)
    native = _native.available(logits.device.type)
    if validate or not native:
        check.ids(_OP, labels, logits.shape[-1], tokens.mask)
        if temperatures is not None:
            check.temperatures(_OP, temperatures, tokens.mask)
    if not native:
        return reference.ppo_loss_from_logits(**given)
    arguments = (logits, labels, temperatures, temperature, note(logits.device), tokens, names)
    return check.naming(_OP, _apply, *arguments, inplace_forward, inplace_backward)
