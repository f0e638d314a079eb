"""`ppo_loss` with options: checks what is given and runs the operator."""

from typing import Any

import torch

from . import _native, _ppo_options, check, reference

_FLOATS = (
    "logprobs",
    "old_logprobs",
    "advantages",
    "vpreds",
    "values",
    "returns",
    "weights",
    "ref_logprobs",
    "entropy",
)
_INPUTS = (*_FLOATS[:6], "mask", *_FLOATS[6:])  # in the order of the operator
_OPTIONAL = ("weights", "ref_logprobs", "entropy")
_DIFFERENTIABLE = ("logprobs", "vpreds", "entropy")
# One more than the names, as in ppo_loss.py: after those of every call stands the factor of the saved gradients.
_PLAIN = len(_ppo_options.STAT_NAMES)
_STATS = _PLAIN + 1 + len(_ppo_options.OPTION_STAT_NAMES)

_forward, _forward_name = _native.define(
    "_ppo_loss_options(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? vpreds, Tensor? values,"
    " Tensor? returns, Tensor mask, Tensor? weights, Tensor? ref_logprobs, Tensor? entropy, Tensor? denominator,"
    " Tensor? row_counts, float[] numbers, int[] choices)"
    " -> (Tensor loss, Tensor stats, Tensor ratio, Tensor counted_advantages, Tensor grad_logprobs,"
    " Tensor grad_vpreds, Tensor grad_entropy)"
)
_backward, _backward_name = _native.define(
    "_ppo_loss_options_backward(Tensor grad_loss, Tensor stats, Tensor grad_logprobs, Tensor? grad_vpreds,"
    " Tensor? grad_entropy) -> (Tensor, Tensor, Tensor)"
)


@_native.register_fake(_forward_name)
def _(logprobs, old_logprobs, advantages, vpreds, values, returns, mask, weights, ref_logprobs, entropy, *_):
    def like(x):
        return logprobs.new_empty(0 if x is None else logprobs.shape)

    tokens = [like(logprobs) for _ in range(3)]
    return logprobs.new_empty(()), logprobs.new_empty(_STATS), *tokens, like(vpreds), like(entropy)


@_native.register_fake(_backward_name)
def _(grad_loss, stats, grad_logprobs, *others):
    return tuple(grad_logprobs.new_empty(0) if x is None else torch.empty_like(x) for x in (grad_logprobs, *others))


class _PPOLossOptions(torch.autograd.Function):
    """The loss, as `_PPOLoss` in ppo_loss.py; vpreds and entropy may be None."""

    @staticmethod
    def forward(ctx, logprobs, vpreds, entropy, outputs):
        loss, ctx.stats, *grads = outputs
        ctx.grads = [None if x is None else grad for x, grad in zip((logprobs, vpreds, entropy), grads)]
        return loss.view_as(loss) if torch.compiler.is_compiling() else loss

    @staticmethod
    def backward(ctx, grad_loss):
        check.no_gradient_of_gradient("ppo_loss", grad_loss)
        found = _backward(grad_loss, ctx.stats, *ctx.grads)
        return *(None if grad is None else x for grad, x in zip(ctx.grads, found)), None


def _prepare(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of tokens that are given, and the mask, checked, contiguous, and but for the mask of one dtype."""
    first = given["logprobs"]
    check.floating("ppo_loss", "logprobs", first)
    critic = any(given[name] is not None for name in ("vpreds", "values", "returns"))
    for name in _FLOATS[1:]:
        x = given[name]
        if x is None and (name in _OPTIONAL or (not critic and name in ("vpreds", "values", "returns"))):
            continue
        check.floating("ppo_loss", name, x)
        check.shape("ppo_loss", name, x, first.shape, "logprobs")
        check.device("ppo_loss", name, x, first.device, "logprobs")
    mask = check.mask("ppo_loss", given["mask"], first.shape, first.device, "logprobs")
    found = {name: given[name] for name in _FLOATS if given[name] is not None}
    found = {name: x.contiguous() for name, x in zip(found, check.same_dtype(*found.values()))}
    return found | {"mask": mask.contiguous()}


def run(**given: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`ppo_loss`, whose arguments these are, by name."""
    found = _ppo_options.choices(**{name: given[name] for name in _ppo_options.CHOICES})
    tensors = _prepare(given)
    first = tensors["logprobs"]
    number, tensor = _ppo_options.denominator(given["denominator"], first, tensors["mask"])
    counts = _ppo_options.row_counts(given["row_counts"], first)
    values = _ppo_options.numbers(**{name: given[name] for name in _ppo_options.NUMBERS} | {"denominator": number})
    _ppo_options.combination(found, given, values)
    if not _native.available(first.device.type):
        denominator = tensor if given["denominator"] is None or tensor is not None else number
        return reference.ppo_loss(**given | tensors | {"denominator": denominator, "row_counts": counts})
    inputs = [tensors.get(name) for name in _INPUTS]
    detached = [x.detach() if x is not None and x.requires_grad else x for x in inputs]
    outputs = _forward(*detached, tensor, counts, values, found)
    return _results(outputs, [tensors.get(name) for name in _DIFFERENTIABLE], given)


def _results(outputs, leaves, given):
    """The loss, connected to its `leaves`, and the dict of statistics."""
    loss, vector, ratio, advantages, *grads = outputs
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        loss = _PPOLossOptions.apply(*leaves, (loss, vector, *grads))
    else:
        for name, x in zip(_DIFFERENTIABLE, leaves):
            if x is not None:
                check.no_tangent("ppo_loss", name, x)
    numbers = vector.unbind()
    by_name = dict(zip(_ppo_options.STAT_NAMES, numbers))
    by_name.update(zip(_ppo_options.OPTION_STAT_NAMES, numbers[_PLAIN + 1 :]))
    on = (given[name] is not None for name in ("vpreds", "dual_clip", "weights", "ref_logprobs", "entropy"))
    stats = {name: by_name[name] for name in _ppo_options.names(*on)}
    return loss, stats | {"policy/advantages": advantages, "policy/ratio": ratio}
