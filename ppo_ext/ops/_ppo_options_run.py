"""`ppo_loss` with options: checks what is given and runs the operator."""

from typing import Any, NamedTuple

import torch

from . import _native, _ppo_options, check
from ._statistics import read, unread

FLOATS = (
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
_DENOMINATOR, _DUAL_CLIP = (_ppo_options.NUMBERS.index(name) for name in ("denominator", "dual_clip"))

_forward, _forward_name = _native.define(
    "_ppo_loss_options(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? vpreds, Tensor? values,"
    " Tensor? returns, Tensor mask, Tensor? weights, Tensor? ref_logprobs, Tensor? entropy, Tensor? denominator,"
    " Tensor? row_counts, float[] numbers)"
    " -> (Tensor loss, Tensor stats, Tensor of_tokens, Tensor grads)"
)
_backward, _backward_name = _native.define(
    "_ppo_loss_options_backward(Tensor grad_loss, Tensor stats, Tensor grads, bool critic, bool needs_vpreds,"
    " bool needs_entropy) -> (Tensor, Tensor, Tensor)"
)


@_native.register_fake(_forward_name)
def _(logprobs, _, __, vpreds, values, returns, mask, weights, ref_logprobs, entropy, *rest):
    def rows(count):
        return logprobs.new_empty(count, *logprobs.shape)

    on = _ppo_options.option_names(rest[2][_DUAL_CLIP] > 0, *(x is not None for x in (weights, ref_logprobs, entropy)))
    stats = logprobs.new_empty(len(_ppo_options.STAT_NAMES) + 1 + len(on))
    return logprobs.new_empty(()), stats, rows(2), rows(1 + (vpreds is not None) + (entropy is not None))


@_native.register_fake(_backward_name)
def _(grad_loss, stats, grads, critic, *needs):
    return tuple(grads.new_empty(grads.shape[1:] if need else 0) for need in (True, *needs))


class PPOLossOptions(torch.autograd.Function):
    """The loss, as `_PPOLoss` in ppo_loss.py; vpreds and entropy may be None."""

    @staticmethod
    def forward(ctx, logprobs, vpreds, entropy, outputs):
        loss, *ctx.saved = outputs
        ctx.critic = vpreds is not None
        return loss.view_as(loss) if torch.compiler.is_compiling() else loss

    @staticmethod
    def backward(ctx, grad_loss):
        check.no_gradient_of_gradient("ppo_loss", grad_loss)
        _, *needs = ctx.needs_input_grad[:3]
        of_logprobs, *found = _backward(grad_loss, *ctx.saved, ctx.critic, *needs)
        return of_logprobs, *(x if need else None for x, need in zip(found, needs)), None


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
_SCALARS = (
    "cliprange",
    "cliprange_value",
    "vf_coef",
    "ratio_threshold",
    *(name for name in _ppo_options.DEFAULTS if name not in _TENSORS),
)
_SIMPLE = {float, int, bool, str, type(None)}
_MOST_PLANS = 64


class Plan(NamedTuple):
    """What the options ask for.

    plain: whether none is on. numbers: those of the operator, of NUMBERS and then of CHOICES; a plain loss has its four
    coefficients alone. names: the statistics in the operator's order, None for the factor of the saved gradients, and for
    those of a critic where there is none.
    """

    plain: bool
    numbers: list[float]
    names: tuple[str | None, ...]


_plans: dict[tuple, Plan] = {}


def plan(op: str, *key: Any) -> Plan:
    """The plan of a call, checked: of the values of _SCALARS, whether there is a critic, and for each of _TENSORS whether
    it is given. Plain numbers and names that came before are not checked again."""
    if torch.compiler.is_compiling():
        return _new_plan(op, key)
    try:
        found = _plans.get(key)
    except TypeError:  # a list has no hash
        found = None
    return _remembered(op, key) if found is None else found


def _remembered(op: str, key: tuple) -> Plan:
    found = _new_plan(op, key)
    bounds = key[0] if type(key[0]) is tuple else key[:1]
    if _SIMPLE.issuperset(map(type, (*bounds, *key[1:]))):
        if len(_plans) == _MOST_PLANS:
            _plans.clear()
        _plans[key] = found
    return found


def _new_plan(op: str, key: tuple) -> Plan:
    critic, *tensors = key[len(_SCALARS) :]
    given = dict(zip((*_SCALARS, *_TENSORS), (*key[: len(_SCALARS)], *tensors)))
    options = {name: given[name] if name in _SCALARS else given[name] or None for name in _ppo_options.DEFAULTS}
    if _ppo_options.is_plain(critic or None, given["cliprange"], given["cliprange_value"], options):
        return Plan(True, _ppo_options.coefficients(op, given), _ppo_options.STAT_NAMES)
    found, values = _ppo_options.choices(op, given), _ppo_options.numbers(op, given)
    _ppo_options.combination(op, found, given, values)
    on = (given["dual_clip"] is not None, *tensors[:3])
    left_out = () if critic else _ppo_options.OF_CRITIC
    names = (None if name in left_out else name for name in _ppo_options.STAT_NAMES)
    return Plan(False, [*values, *map(float, found)], (*names, None, *_ppo_options.option_names(*on)))


def plan_of(op: str, given: dict[str, Any]) -> Plan:
    """The plan of a call whose arguments these are, by name."""
    scalars = (given[name] for name in _SCALARS)
    return plan(op, *scalars, given["vpreds"] is not None, *(given[name] is not None for name in _TENSORS))


# ---- the op ---------------------------------------------------------------------------------------------------------


def denominators(op, given, of, first, mask, numbers):
    """(the numbers, among them the denominator if it is one, the denominator if it is a tensor, the counts of rows)."""
    number, tensor = _ppo_options.denominator(op, given["denominator"], of, first, mask)
    if number != 0:
        numbers = [*numbers]
        numbers[_DENOMINATOR] = number
    return numbers, tensor, _ppo_options.row_counts(op, given["row_counts"], of, first)


def run_operator(tensors, mask, denominator, row_counts, plan):
    """The operator's outputs. `tensors`: of FLOATS, detached, in the forms that it takes, like the mask."""
    numbers, total, counts = plan.numbers, None, None
    if denominator is not None or row_counts is not None:
        given = {"denominator": denominator, "row_counts": row_counts}
        numbers, total, counts = denominators("ppo_loss", given, "logprobs", tensors[0], mask, numbers)
    # each by its name, which is faster than to put the arguments together from parts of `tensors`
    logprobs, old_logprobs, advantages, vpreds, values, returns, weights, ref_logprobs, entropy = tensors
    return _forward(
        logprobs,
        old_logprobs,
        advantages,
        vpreds,
        values,
        returns,
        mask,
        weights,
        ref_logprobs,
        entropy,
        total,
        counts,
        numbers,
    )


def named_stats(names, vector, of_tokens):
    """The dict of statistics; `of_tokens`: the advantages and the ratios of the tokens that count."""
    make = read if torch.compiler.is_compiling() else unread
    return make(names, vector, of_tokens)
