"""What ppo_loss_from_hidden and ppo_loss_from_logits share: the loss of tokens whose log-probabilities and entropies are
known, and its gradients before the last token is."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from . import check
from . import ppo_loss as _loss

TOKENS = ("old_logprobs", "advantages", "vpreds", "values", "returns")
# The arguments of the operators that come after those of the log-probabilities.
TENSORS = "".join(f"Tensor {name}, " for name in TOKENS) + "Tensor mask"
COEFFICIENTS = ("cliprange", "cliprange_value", "vf_coef", "ratio_threshold", "entropy_coef")
NUMBERS = ", ".join(f"float {name}" for name in COEFFICIENTS)
# What they return first, see TokenLoss.
RESULTS = "Tensor loss, Tensor stats, Tensor ratio, Tensor counted_advantages"


class TokenLoss(NamedTuple):
    """The results of an operator, but for the gradients of what the logits are made of.

    loss: []. stats: one number for each name in STAT_NAMES. ratio, counted_advantages, and the gradient of the loss with
    respect to vpreds: of the tokens' shape.
    """

    loss: torch.Tensor
    stats: torch.Tensor
    ratio: torch.Tensor
    counted_advantages: torch.Tensor
    grad_vpreds: torch.Tensor


STAT_NAMES = (*_loss.STAT_NAMES, "policy/entropy")


def fake_results(mask: torch.Tensor, dtype: torch.dtype) -> TokenLoss:
    token = [mask.new_empty(mask.shape, dtype=dtype) for _ in range(3)]
    return TokenLoss(mask.new_empty((), dtype=dtype), mask.new_empty(len(STAT_NAMES), dtype=dtype), *token)


# ---- checks ---------------------------------------------------------------------------------------------------------


def prepare(op: str, labels: torch.Tensor, tokens: tuple, mask: Any, dtype: torch.dtype) -> tuple[list, torch.Tensor]:
    """The tensors of TOKENS, checked, dense and of one dtype, and the mask. dtype: that of the log-probabilities."""
    for name, x in zip(TOKENS, tokens):
        check.floating(op, name, x)
        check.shape(op, name, x, labels.shape, "labels")
        check.device(op, name, x, labels.device, "labels")
        check.no_tangent(op, name, x)
    mask = check.mask(op, mask, labels.shape, labels.device, "labels")
    *found, _ = check.same_dtype(*tokens, torch.empty(0, dtype=dtype, device=labels.device))
    return [x.contiguous() for x in found], mask.contiguous()


def numbers(
    op: str, cliprange: Any, cliprange_value: Any, vf_coef: Any, ratio_threshold: Any, entropy_coef: Any
) -> tuple:
    """The coefficients, checked."""
    cliprange = check.not_negative(op, "cliprange", cliprange)
    cliprange_value = check.not_negative(op, "cliprange_value", cliprange_value)
    vf_coef = check.finite(op, "vf_coef", vf_coef)
    ratio_threshold = check.number(op, "ratio_threshold", ratio_threshold)
    if math.isnan(ratio_threshold):
        check.fail(op, "ratio_threshold", "be a number", ratio_threshold)
    return cliprange, cliprange_value, vf_coef, ratio_threshold, check.finite(op, "entropy_coef", entropy_coef)


def check_tokens(op: str, like: torch.Tensor, tokens: tuple, mask: torch.Tensor, numbers: tuple) -> torch.dtype:
    """What the public functions see to, in the operators. `like`: the labels. Returns the tokens' dtype."""
    dtype = tokens[0].dtype
    if dtype not in (torch.float32, torch.float64):
        check.fail(op, TOKENS[0], "be float32 or float64", dtype, TypeError)
    expected = {name: (x, dtype) for name, x in zip(TOKENS, tokens)} | {"mask": (mask, torch.bool)}
    for name, (x, wanted) in expected.items():
        if x.dtype != wanted:
            check.fail(op, name, f"be {str(wanted).removeprefix('torch.')}", x.dtype, TypeError)
        check.shape(op, name, x, like.shape, "labels")
        check.device(op, name, x, like.device, "labels")
        if not x.is_contiguous():
            check.fail(op, name, "be contiguous", f"strides {list(x.stride())}")
    for name, x in zip(("cliprange", "cliprange_value"), numbers):
        if not x >= 0:
            check.fail(op, name, "not be negative", x)
    for name, x in (("vf_coef", numbers[2]), ("entropy_coef", numbers[4])):
        if not math.isfinite(x):
            check.fail(op, name, "be a finite number", x)
    return dtype


# ---- the loss -------------------------------------------------------------------------------------------------------


def share_of(mask: torch.Tensor) -> torch.Tensor:
    """One over the number of tokens that count, which is known before the first log-probability."""
    return 1.0 / mask.sum().clamp(min=1).double()


def row_gradients(logprobs, tokens, mask, numbers, share):
    """The gradients of the loss with respect to some rows' log-probabilities and entropies (None if it has none), before
    it is known whether the ratio guard skips the minibatch."""
    *coefficients, entropy_coef = numbers
    grad = _loss._forward(logprobs.to(tokens[0].dtype), *tokens, mask, *coefficients)[4]
    return (grad * share).to(logprobs.dtype), entropy_gradients(logprobs, mask, entropy_coef, share)


def entropy_gradients(logprobs, mask, entropy_coef, share):
    return None if entropy_coef == 0 else (mask * (-entropy_coef * share)).to(logprobs.dtype)


def whole_loss(logprobs, entropy, tokens, mask, numbers) -> tuple[TokenLoss, torch.Tensor]:
    """The loss of all tokens with its statistics, and its gradient with respect to the log-probabilities."""
    *coefficients, entropy_coef = numbers
    outputs = _loss._forward(logprobs.to(tokens[0].dtype), *tokens, mask, *coefficients)
    loss, vector, ratio, counted_advantages, *grads = outputs
    grad_logprobs, grad_vpreds = _loss._backward(torch.ones_like(loss), vector, *grads)
    rows = (entropy.to(loss.dtype).reshape(1, -1), mask.to(loss.dtype).reshape(1, -1))
    stats = torch.cat([vector[:-1], torch.ops.ppo_ext._masked_moments.default(*rows)[0, 1:2]])
    if entropy_coef != 0:
        loss = loss - torch.where(skipped(stats), 0, entropy_coef * stats[-1])
        stats[STAT_NAMES.index("loss/total")] = loss
    return TokenLoss(loss, stats, ratio, counted_advantages, grad_vpreds), grad_logprobs.to(logprobs.dtype)


def skipped(stats: torch.Tensor) -> torch.Tensor:
    """Whether the ratio guard skips the minibatch."""
    return stats[STAT_NAMES.index("policy/skipped")] != 0


def zero_if_skipped(stats: torch.Tensor, gradients: Iterable[torch.Tensor], numbers: tuple) -> None:
    """The gradients that were made before the ratio guard could decide."""
    if numbers[COEFFICIENTS.index("ratio_threshold")] == math.inf:
        return
    if stats.device.type != "cpu" or skipped(stats):
        for grad in gradients:
            grad.masked_fill_(skipped(stats), 0)


def named_stats(found: TokenLoss) -> dict[str, torch.Tensor]:
    *numbers, entropy = found.stats.unbind()
    stats = dict(zip(_loss.STAT_NAMES, numbers))
    stats |= {"policy/advantages": found.counted_advantages, "policy/ratio": found.ratio}
    return stats | {"policy/entropy": entropy}


# ---- the backward pass ----------------------------------------------------------------------------------------------


def _graph_is_kept() -> bool:
    """Whether this backward pass may run again; then what was saved must stay as it is."""
    find = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return find is None or find()


def times(grads: list[torch.Tensor | None], grad_loss: torch.Tensor) -> list[torch.Tensor | None]:
    """The saved gradients times that of the loss. A gradient of 0, which masked tokens have, stays 0.

    They are large, so that a graph that is freed gives them away: scaled in place and, on a CPU, where the usual factor
    of 1 is seen, as they are.
    """
    if torch.compiler.is_compiling() or _graph_is_kept():
        return [None if grad is None else product(grad, grad_loss) for grad in grads]
    if grad_loss.device.type != "cpu" or grad_loss.item() != 1:
        for grad in grads:
            if grad is not None:
                _scale(grad, grad_loss)
    return grads


def product(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.where(grad == 0, 0, grad * factor.to(grad.dtype))


def _scale(grad: torch.Tensor, factor: torch.Tensor) -> None:
    """In place, some rows at a time."""
    rows = max(1, (1 << 24) * len(grad) // max(1, grad.numel())) if grad.dim() else 1
    for part in grad.split(rows) if grad.dim() else (grad,):
        part.copy_(product(part, factor))
