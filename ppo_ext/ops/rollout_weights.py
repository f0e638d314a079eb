"""Importance weights for responses that another engine sampled, truncated or masked."""

from typing import Any, Literal

import torch

from . import _native, check, reference

# The places of the names are RolloutKind and RolloutLevel in csrc/rollout_weights.h.
_KINDS = ("tis", "icepop")
_LEVELS = ("token", "sequence", "geometric")
STAT_NAMES = ("mean", "ess", "share_low", "share_high", "share_invalid", "ratio_max")  # RolloutStat

_rollout_weights, _rollout_weights_name = _native.define(
    "_rollout_weights(Tensor old_logprobs, Tensor rollout_logprobs, Tensor mask, int kind, int level, float low,"
    " float high) -> (Tensor weights, Tensor stats)"
)


@_native.register_fake(_rollout_weights_name)
def _(old_logprobs, *_):
    return old_logprobs.new_empty(old_logprobs.shape), old_logprobs.new_empty(len(STAT_NAMES))


def _place(argument: str, name: Any, allowed: tuple[str, ...]) -> int:
    if not isinstance(name, str):
        check.fail("rollout_weights", argument, "be a str", type(name).__name__, TypeError)
    if name not in allowed:
        check.fail("rollout_weights", argument, f"be one of {', '.join(map(repr, allowed))}", repr(name))
    return allowed.index(name)


def _bounds(bounds: Any) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        got = f"{len(bounds)} numbers" if isinstance(bounds, (tuple, list)) else type(bounds).__name__
        check.fail("rollout_weights", "bounds", "be a pair (low, high)", got, TypeError)
    low, high = (check.not_negative("rollout_weights", "bounds", x) for x in bounds)
    if low > high:
        check.fail("rollout_weights", "bounds", "have low <= high", f"({low}, {high})")
    return low, high


def rollout_weights(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    kind: Literal["tis", "icepop"] = "tis",
    level: Literal["token", "sequence", "geometric"] = "token",
    bounds: tuple[float, float] = (0.0, 2.0),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Importance weights for responses that another engine sampled, truncated or masked.

        d = old_logprobs - rollout_logprobs
        ratio = exp(d) ("token"), exp(sum of d over the row) ("sequence"), exp(mean of d over the row) ("geometric")
        weights = clip(ratio, low, high) ("tis"), or ratio where low <= ratio <= high, else 0 ("icepop")

    They are the `weights` of `ppo_loss`.

    Args:
        old_logprobs: [B, T] (or any shape) float32, bfloat16, float16 or float64, log-probabilities of the tokens under
            the policy before the update, computed by the trainer.
        rollout_logprobs: same shape, those that the engine that sampled the tokens reports.
        mask: same shape, bool, int or float, nonzero where a token counts.
        kind: "tis" truncates the ratio at both bounds, "icepop" drops tokens whose ratio lies outside.
        level: whose ratio decides. A row is the last dimension; all its tokens share the ratio of "sequence" and
            "geometric".
        bounds: (low, high), finite in float32, 0 <= low <= high, both inclusive.

    Returns:
        (weights, stats): weights of the inputs' shape, 0 where the mask is 0, finite for any input and never with a
        gradient, and a dict of tensors of shape []: "mean" of the weights, "ess", their effective sample size over the
        number of tokens, (sum w)^2 / (n sum w^2); "share_low", "share_high" and "share_invalid", the shares of tokens
        whose ratio is below low, above high, or NaN; "ratio_max", the largest ratio before the bounds, at most the
        largest float32. All are float32 (float64 if an input is float64).

    Raises:
        TypeError: an input is not of a floating dtype, a tensor is not dense, kind or level is no str, or bounds is no
            pair of numbers.
        ValueError: shapes or devices do not match, kind or level is none of its names, or bounds are negative, not
            finite, or in the wrong order.

    Notes:
        Masked inputs never influence a result. A NaN ratio, as of two probabilities of 0, gives the weight 0. If no token
        counts, all results are 0. Sums are in float64 in a fixed order: same bits on every run and for any number of
        threads.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncated
    importance sampling); Ling team 2025 (arXiv:2510.18855), IcePop.
    """
    numbers = _place("kind", kind, _KINDS), _place("level", level, _LEVELS), *_bounds(bounds)
    check.floating("rollout_weights", "old_logprobs", old_logprobs)
    check.floating("rollout_weights", "rollout_logprobs", rollout_logprobs)
    shape, device = old_logprobs.shape, old_logprobs.device
    check.shape("rollout_weights", "rollout_logprobs", rollout_logprobs, shape, "old_logprobs")
    check.device("rollout_weights", "rollout_logprobs", rollout_logprobs, device, "old_logprobs")
    mask = check.mask("rollout_weights", mask, shape, device, "old_logprobs").contiguous()
    tensors = [x.detach().contiguous() for x in check.same_dtype(old_logprobs, rollout_logprobs)]
    if not _native.available(device.type):
        old, rollout = tensors
        return reference.rollout_weights(old, rollout, mask, kind=kind, level=level, bounds=bounds)
    weights, stats = _rollout_weights(*tensors, mask, *numbers)
    return weights, dict(zip(STAT_NAMES, stats.unbind()))
