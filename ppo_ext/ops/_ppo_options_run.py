"""`ppo_loss` with options: checks what is given and runs the operator."""

import functools
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
_CRITIC = ("vpreds", "values", "returns")
_OPTIONAL = ("weights", "ref_logprobs", "entropy")
_DIFFERENTIABLE = ("logprobs", "vpreds", "entropy")
_DENOMINATOR, _DUAL_CLIP = (_ppo_options.NUMBERS.index(name) for name in ("denominator", "dual_clip"))

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
def _(logprobs, _, __, vpreds, values, returns, mask, weights, ref_logprobs, entropy, *rest):
    def like(x):
        return logprobs.new_empty(0 if x is None else logprobs.shape)

    on = _ppo_options.option_names(rest[2][_DUAL_CLIP] > 0, *(x is not None for x in (weights, ref_logprobs, entropy)))
    stats = logprobs.new_empty(len(_ppo_options.STAT_NAMES) + 1 + len(on))
    return logprobs.new_empty(()), stats, *(like(logprobs) for _ in range(3)), like(vpreds), like(entropy)


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


def prepare(
    op: str, given: dict[str, Any], names: tuple[str, ...], of: str, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The tensors of these names that are given, and the mask, checked, contiguous, and but for the mask of one dtype,
    `dtype` at least. `of` is the tensor whose shape and device they must have."""
    like = given[of]
    critic = any(given[name] is not None for name in _CRITIC)
    optional = _OPTIONAL if critic else (*_OPTIONAL, *_CRITIC)
    found = {name: given[name] for name in names if given[name] is not None or name not in optional}
    for name, x in found.items():
        check.floating(op, name, x)
        check.shape(op, name, x, like.shape, of)
        check.device(op, name, x, like.device, of)
    mask = check.mask(op, given["mask"], like.shape, like.device, of)
    *same, _ = check.same_dtype(*found.values(), torch.empty(0, dtype=dtype, device=like.device))
    return {name: x.contiguous() for name, x in zip(found, same)} | {"mask": mask.contiguous()}


# ---- the options ----------------------------------------------------------------------------------------------------

_TENSORS = ("weights", "ref_logprobs", "entropy", "denominator", "row_counts")
_REST = (
    "cliprange_value",
    "vf_coef",
    "ratio_threshold",
    *(name for name in _ppo_options.DEFAULTS if name not in _TENSORS),
)
_SIMPLE = {float, int, bool, str, type(None)}


def _parsed(op: str, low: Any, high: Any, *rest: Any) -> tuple[list[float], list[int], tuple]:
    """The numbers and names of the operator, and the names of the statistics in its order (with None for the factor of
    the saved gradients). `rest` is of _REST, then for each of _TENSORS a flag that tells whether it is given."""
    given = dict(zip((*_REST, *_TENSORS), rest)) | {"cliprange": low if high is None else (low, high)}
    found, values = _ppo_options.choices(op, given), _ppo_options.numbers(op, given)
    _ppo_options.combination(op, found, given, values)
    on = (given["dual_clip"] is not None, *(given[name] for name in _TENSORS[:3]))
    return values, found, (*_ppo_options.STAT_NAMES, None, *_ppo_options.option_names(*on))


_parsed_once = functools.lru_cache(maxsize=64)(_parsed)


def options(op: str, given: dict[str, Any]) -> tuple[list[float], list[int], tuple]:
    """`_parsed`, from memory if the options are the same numbers and names as before."""
    pair = given["cliprange"]
    low, high = pair if type(pair) is tuple and len(pair) == 2 else (pair, None)
    key = (op, low, high, *[given[name] for name in _REST], *[given[name] is not None for name in _TENSORS])
    simple = _SIMPLE.issuperset(map(type, key)) and not torch.compiler.is_compiling()
    return _parsed_once(*key) if simple else _parsed(*key)


# ---- the op ---------------------------------------------------------------------------------------------------------


def denominators(op, given, of, first, mask, numbers):
    """(the numbers, among them the denominator if it is one, the denominator if it is a tensor, the counts of rows)."""
    number, tensor = _ppo_options.denominator(op, given["denominator"], of, first, mask)
    if number != 0:
        numbers = [*numbers]
        numbers[_DENOMINATOR] = number
    return numbers, tensor, _ppo_options.row_counts(op, given["row_counts"], of, first)


def _run_operator(tensors, mask, first, given, numbers, found):
    """The operator's outputs; `tensors` and `mask` in the forms that it takes."""
    total = counts = None
    if given["denominator"] is not None or given["row_counts"] is not None:
        numbers, total, counts = denominators("ppo_loss", given, "logprobs", first, mask, numbers)
    tensors = [x.detach() if x is not None and x.requires_grad else x for x in tensors]
    return _forward(*tensors[:6], mask, *tensors[6:], total, counts, numbers, found)


def _run_unprepared(given, numbers, found):
    """The same for inputs that need no conversion, as in ppo_loss.py; None for others."""
    if torch.compiler.is_compiling():
        return None
    try:
        tensors = [given[name] for name in _FLOATS]
        first = tensors[0]
        dtype = first.dtype
        if dtype not in (torch.float32, torch.float64) or not _native.available(first.device.type):
            return None
        for x in tensors:
            if x is not None and not (x.dtype == dtype and x.is_contiguous()):
                return None
        check.weights("ppo_loss", given["mask"])
        return _run_operator(tensors, given["mask"].bool().contiguous(), first, given, numbers, found)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def run(given: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`ppo_loss`, whose arguments these are, by name."""
    numbers, found, names = options("ppo_loss", given)
    outputs = _run_unprepared(given, numbers, found)
    if outputs is None:
        check.floating("ppo_loss", "logprobs", given["logprobs"])
        given = given | prepare("ppo_loss", given, _FLOATS, "logprobs")
        first, mask = given["logprobs"], given["mask"]
        if not _native.available(first.device.type):
            denominators("ppo_loss", given, "logprobs", first, mask, numbers)
            return reference.ppo_loss(**given)
        outputs = _run_operator([given[name] for name in _FLOATS], mask, first, given, numbers, found)
    return _results(outputs, given, names)


def _results(outputs, given, names):
    """The loss, connected to what it depends on, and the dict of statistics."""
    loss, vector, ratio, advantages, *grads = outputs
    leaves = given["logprobs"], given["vpreds"], given["entropy"]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        loss = _PPOLossOptions.apply(*leaves, (loss, vector, *grads))
    else:
        for name, x in zip(_DIFFERENTIABLE, leaves):
            if x is not None:
                check.no_tangent("ppo_loss", name, x)
    return loss, named_stats(names, vector, leaves[1] is not None, advantages, ratio)


def named_stats(names, vector, critic, advantages, ratio):
    stats = dict(zip(names, vector.unbind()))
    del stats[None]
    if not critic:
        stats = {name: x for name, x in stats.items() if name not in _ppo_options.OF_CRITIC}
    stats["policy/advantages"] = advantages
    stats["policy/ratio"] = ratio
    return stats
