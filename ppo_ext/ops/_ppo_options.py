"""The options of `ppo_loss`: their checks, and the form in which the operator takes them."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from . import check

# The order of PPOStat in csrc/ppo_loss.h.
STAT_NAMES = (
    "loss/policy",
    "loss/value",
    "loss/total",
    "policy/approxkl",
    "policy/policykl",
    "policy/clipfrac",
    "policy/advantages_mean",
    "policy/ratio_mean",
    "policy/skipped",
    "returns/mean",
    "returns/var",
    "val/vpred",
    "val/error",
    "val/clipfrac",
    "val/mean",
    "val/var",
)
# What a call with options adds, in the order of PPOOptionStat in csrc/ppo_loss_options.h.
OPTION_STAT_NAMES = (
    "policy/approxkl_k3",
    "policy/clipfrac_low",
    "policy/clipfrac_high",
    "policy/ratio_max",
    "policy/ratio_min",
    "policy/clipfrac_dual",
    "policy/weights_mean",
    "policy/weights_zero",
    "loss/kl",
    "policy/ref_kl",
    "loss/entropy",
    "policy/entropy",
)
OF_CRITIC = ("loss/value", *(name for name in STAT_NAMES if name.startswith(("returns/", "val/"))))

RatioLevel = Literal["token", "sequence", "sequence_token"]
PolicyLoss = Literal["clip", "cispo", "reinforce"]
KLEstimator = Literal["k1", "k2", "k3", "abs"]
KLGradient = Literal["exact", "straight_through", "weighted"]
ValueLoss = Literal["mse", "huber"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "token_sum"]
# The place of a name is its number in csrc/ppo_loss_options.h.
CHOICES: dict[str, tuple[str, ...]] = {
    "ratio_level": ("token", "sequence", "sequence_token"),
    "policy_loss": ("clip", "cispo", "reinforce"),
    "kl_estimator": ("k1", "k2", "k3", "abs"),
    "kl_gradient": ("exact", "straight_through", "weighted"),
    "value_loss": ("mse", "huber"),
    "aggregation": ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm", "token_sum"),
}


# What ppo_loss computes if it is given nothing else: TRL's loss.
DEFAULTS = {
    "dual_clip": None,
    "log_ratio_clamp": None,
    "ratio_level": "token",
    "policy_loss": "clip",
    "weights": None,
    "ref_logprobs": None,
    "kl_coef": 0.0,
    "kl_estimator": "k1",
    "kl_gradient": "exact",
    "entropy": None,
    "entropy_coef": 0.0,
    "value_loss": "mse",
    "huber_delta": 10.0,
    "aggregation": "token_mean",
    "norm_length": None,
    "denominator": None,
    "scale": 1.0,
    "row_counts": None,
}
# The order of ppo_options_of in csrc/ppo_loss_options_entry.h, where CHOICES come after them.
NUMBERS = (
    "clip_low",
    "clip_high",
    "cliprange_value",
    "vf_coef",
    "ratio_threshold",
    "dual_clip",
    "log_ratio_clamp",
    "kl_coef",
    "entropy_coef",
    "huber_delta",
    "norm_length",
    "denominator",
    "scale",
)


def is_plain(vpreds: Any, cliprange: Any, cliprange_value: Any, options: dict[str, Any]) -> bool:
    """Whether no option is on: the loss is TRL's, with TRL's statistics."""
    pair = isinstance(cliprange, (tuple, list))
    off = (
        x is default if x is None or default is None else isinstance(x, (str, int, float)) and x == default
        for x, default in ((x, DEFAULTS[name]) for name, x in options.items())
    )
    return not pair and vpreds is not None and cliprange_value is not None and all(off)


def option_names(dual_clip: bool, weights: bool, ref_logprobs: bool, entropy: bool) -> tuple[str, ...]:
    """The statistics that a call with options adds, in their order."""
    given = {
        "policy/clipfrac_dual": dual_clip,
        "policy/weights_mean": weights,
        "policy/weights_zero": weights,
        "loss/kl": ref_logprobs,
        "policy/ref_kl": ref_logprobs,
        "loss/entropy": entropy,
        "policy/entropy": entropy,
    }
    return tuple(name for name in OPTION_STAT_NAMES if given.get(name, True))


def bounds(op: str, cliprange: Any) -> tuple[float, float]:
    """How far the ratio may go below and above 1: a number for both, or a pair."""
    if not isinstance(cliprange, (tuple, list)):
        both = check.not_negative(op, "cliprange", cliprange)
        return both, both
    if len(cliprange) != 2:
        check.fail(op, "cliprange", "be a number or a pair (low, high)", f"{len(cliprange)} numbers")
    low, high = (check.not_negative(op, "cliprange", x) for x in cliprange)
    return low, high


def numbers(op: str, given: dict[str, Any]) -> list[float]:
    """The options that are numbers, checked, in the order of NUMBERS; 0 in the place of the denominator."""
    value_range, clamp, length = (given[name] for name in ("cliprange_value", "log_ratio_clamp", "norm_length"))
    return [
        *bounds(op, given["cliprange"]),
        math.inf if value_range is None else check.not_negative(op, "cliprange_value", value_range),
        check.finite(op, "vf_coef", given["vf_coef"]),
        threshold(op, given["ratio_threshold"]),
        0.0 if given["dual_clip"] is None else _above_one(op, given["dual_clip"]),
        0.0 if clamp is None else _positive_or_none(op, "log_ratio_clamp", clamp),
        check.finite(op, "kl_coef", given["kl_coef"]),
        check.finite(op, "entropy_coef", given["entropy_coef"]),
        check.positive(op, "huber_delta", given["huber_delta"]),
        0.0 if length is None else _positive_or_none(op, "norm_length", length),
        0.0,
        check.finite(op, "scale", given["scale"]),
    ]


def coefficients(op: str, given: dict[str, Any]) -> list[float]:
    """Those of a loss without options, checked."""
    return [
        check.not_negative(op, "cliprange", given["cliprange"]),
        check.not_negative(op, "cliprange_value", given["cliprange_value"]),
        check.finite(op, "vf_coef", given["vf_coef"]),
        threshold(op, given["ratio_threshold"]),
    ]


def threshold(op: str, ratio_threshold: Any) -> float:
    ratio_threshold = check.number(op, "ratio_threshold", ratio_threshold)
    if ratio_threshold != ratio_threshold:
        check.fail(op, "ratio_threshold", "be a number", ratio_threshold)
    return ratio_threshold


def _positive_or_none(op: str, argument: str, x: Any) -> float:
    return check.positive(op, argument, x, "be None or a positive finite number")


def _above_one(op: str, dual_clip: Any) -> float:
    x = check.number(op, "dual_clip", dual_clip)
    if not 1 < x < math.inf:
        check.fail(op, "dual_clip", "be None or a finite number larger than 1", x)
    check.in_range(op, "dual_clip", x)
    return x


def choices(op: str, given: dict[str, Any]) -> list[int]:
    """The options that are names, as their numbers, in the order of CHOICES."""
    found = []
    for argument, allowed in CHOICES.items():
        name = given[argument]
        if not isinstance(name, str):
            check.fail(op, argument, "be a str", type(name).__name__, TypeError)
        if name not in allowed:
            check.fail(op, argument, f"be one of {', '.join(map(repr, allowed))}", repr(name))
        found.append(allowed.index(name))
    return found


def denominator(op: str, x: Any, of: str, first: torch.Tensor, mask: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """(a number, None) or (0, a tensor [] in the dtype of the arithmetic); (0, None) if it is not given. `first` is a
    tensor of tokens in that dtype, and `of` the name of the one that decides about devices and shapes."""
    if x is None:
        return 0.0, None
    if isinstance(x, torch.Tensor):
        check.tensor(op, "denominator", x)
        if x.numel() != 1 or x.dtype.is_complex or x.is_quantized:
            check.fail(op, "denominator", "be a number or a tensor of one number", list(x.shape))
        check.device(op, "denominator", x, first.device, of)
        return 0.0, x.detach().reshape(()).to(first.dtype)
    x = check.not_negative(op, "denominator", x)
    # Only an empty part of a batch may come with a denominator of 0. The host waits for the mask in this case alone.
    if x == 0 and bool(mask.any()):
        check.fail(op, "denominator", "be positive where the mask has tokens that count", x)
    return (x, None) if x > 0 else (1.0, None)


def row_counts(op: str, x: Any, of: str, first: torch.Tensor) -> torch.Tensor | None:
    """The number of tokens of each whole row, in the dtype of the arithmetic."""
    if x is None:
        return None
    check.tensor(op, "row_counts", x)
    if x.dtype.is_complex or x.is_quantized:
        check.fail(op, "row_counts", "be int or float", x.dtype, TypeError)
    check.shape(op, "row_counts", x, first.shape[:-1], f"the rows of {of}")
    check.device(op, "row_counts", x, first.device, of)
    return x.detach().to(first.dtype).contiguous()


def combination(op: str, found: Sequence[int], given: dict[str, Any], values: Sequence[float]) -> None:
    """Refuses options that mean nothing together. `found` is of `choices`, `values` of `numbers`; in `given` the tensors
    are flags that tell whether they are given."""
    ratio_level, policy_loss, _, _, _, aggregation = found
    names = ("dual_clip", "kl_coef", "entropy_coef", "norm_length")
    dual_clip, kl_coef, entropy_coef, norm_length = (values[NUMBERS.index(name)] for name in names)
    policy, level, mode = (
        CHOICES[name][number]
        for name, number in (("policy_loss", policy_loss), ("ratio_level", ratio_level), ("aggregation", aggregation))
    )
    if dual_clip and policy != "clip":
        check.fail(op, "dual_clip", f"be None with policy_loss={policy!r}", dual_clip)
    if level != "token" and policy == "reinforce":
        check.fail(op, "ratio_level", "be 'token' with policy_loss='reinforce'", repr(level))
    if kl_coef and not given["ref_logprobs"]:
        check.fail(op, "kl_coef", "be 0 with ref_logprobs=None", kl_coef)
    if entropy_coef and not given["entropy"]:
        check.fail(op, "entropy_coef", "be 0 with entropy=None", entropy_coef)
    if norm_length and mode != "seq_mean_token_sum_norm":
        check.fail(op, "norm_length", f"be None with aggregation={mode!r}", norm_length)
    if given["denominator"] and mode == "token_sum":
        check.fail(op, "denominator", "be None with aggregation='token_sum'", "one")
    if given["row_counts"] and mode != "seq_mean_token_mean":
        check.fail(op, "row_counts", f"be None with aggregation={mode!r}", "a tensor")
    if given["row_counts"] and level != "token":
        check.fail(op, "row_counts", f"be None with ratio_level={level!r}", "a tensor")
