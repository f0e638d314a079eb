"""Generalised advantage estimation as one reverse scan."""

from typing import Any

import torch

from . import _native, check, reference

_gae, _gae_name = _native.define(
    "_gae(Tensor values, Tensor rewards, Tensor? mask, Tensor? bootstrap, Tensor? gamma_lams, Tensor? cu_seqlens,"
    " float gamma, float lam, float lam_returns, bool decoupled) -> (Tensor advantages, Tensor returns)"
)


@_native.register_fake(_gae_name)
def _(values, *_):
    return values.new_empty(values.shape), values.new_empty(values.shape)


def gae(
    values: torch.Tensor,
    rewards: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float | torch.Tensor = 0.95,
    lam_returns: float | None = None,
    bootstrap: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation: advantages and returns of a batch of sequences.

        delta_t = rewards_t + gamma * values_{t+1} - values_t
        advantages_t = delta_t + gamma * lam * advantages_{t+1}
        returns_t = advantages_t + values_t

    where t + 1 is the next token that counts; after the last one the value is bootstrap, or 0, and the advantage 0. With
    lam_returns, the returns are values_t + A_t, where A is the advantage with that lambda, from the same scan.

    Args:
        values: [B, T] float32, bfloat16, float16 or float64, the value of the state before each token; [N] with
            cu_seqlens.
        rewards: of the same shape, of the same dtypes, the reward for each token.
        mask: of the same shape, bool, int or float, nonzero where a token counts; None counts all. Tokens that do not
            count are left out of the recursion as if they were deleted, also between tokens that count (such as the
            output of a tool).
        gamma, lam: the discount and GAE's lambda; both and their product must be finite in float32. lam may be a tensor
            [B] of such numbers, one a sequence, see `length_adaptive_lam`.
        lam_returns: lambda of the returns, a number; None for that of the advantages.
        bootstrap: [B] float, the value of the state after the last token: of a response that was cut off; 0 for one
            that came to its end. None for 0.
        cu_seqlens: [B + 1] int64 or int32. The tokens [N] are those of B sequences, one after the other without
            padding: sequence b has those from cu_seqlens[b] to cu_seqlens[b + 1]. It starts with 0, does not decrease,
            and ends with N.

    Returns:
        (advantages, returns), each of the shape of values, float32 (float64 if an input is float64), 0 where the mask
        is 0.

    Raises:
        TypeError: an input is not of a floating dtype, a tensor is not dense, or gamma, lam or lam_returns is not a
            number.
        ValueError: shapes or devices do not match, the shape is not [B, T], gamma, a lambda or their product is not
            finite, or, on the CPU, cu_seqlens is not as above. On CUDA, where nobody waits to look at it, the results
            are then undefined, as they are for a lam [B] that is not finite.

    Notes:
        Not differentiable: the inputs are detached. Masked inputs never influence a result, nor does the bootstrap of a
        sequence without a token that counts. B = 0 and T = 0 give empty results. Sums run in float32 (float64 for
        float64). On the CPU the scan is the serial recurrence; on CUDA it is a parallel scan in a fixed order, which
        rounds differently. On each device the same input gives the same bits.

    Source: Schulman et al. 2015 (arXiv:1506.02438), equation 16; TRL 0.11.4, `PPOTrainer.compute_advantages`. The two
    are equal where the tokens that count are one block. TRL lets the advantage decay through masked tokens in between.
    lam_returns: Yue et al. 2025 (arXiv:2504.05118), decoupled GAE.
    """
    check.floating("gae", "values", values)
    check.floating("gae", "rewards", rewards)
    cu_seqlens, sequences = _sequences(values, cu_seqlens)
    check.shape("gae", "rewards", rewards, values.shape, "values")
    check.device("gae", "rewards", rewards, values.device, "values")
    gamma, lam, lams = _decays(gamma, lam, sequences, values)
    decoupled = lam_returns is not None
    lam_returns = _lam(gamma, "lam_returns", lam_returns) if decoupled else lam
    if mask is not None:
        mask = check.mask("gae", mask, values.shape, values.device, "values").contiguous()
    if bootstrap is not None:
        check.floating("gae", "bootstrap", bootstrap)
        check.shape("gae", "bootstrap", bootstrap, torch.Size([sequences]), _OF_SEQUENCES)
        check.device("gae", "bootstrap", bootstrap, values.device, "values")
    given = [x.detach() for x in (values, rewards, bootstrap) if x is not None]
    values, rewards, *rest = (x.contiguous() for x in check.same_dtype(*given))
    bootstrap = rest[0] if rest else None
    if not _native.available(values.device.type):
        options = {"lam_returns": lam_returns if decoupled else None, "bootstrap": bootstrap, "cu_seqlens": cu_seqlens}
        return reference.gae(values, rewards, mask, gamma=gamma, lam=lam if lams is None else lams, **options)
    gamma_lams = None if lams is None else (gamma * lams.detach().double()).to(values.dtype).contiguous()
    return _gae(values, rewards, mask, bootstrap, gamma_lams, cu_seqlens, gamma, lam, lam_returns, decoupled)


_OF_SEQUENCES = "the first dimension of values"  # also of packed ones, where it is the number of sequences


def _sequences(values: torch.Tensor, cu_seqlens: Any) -> tuple[torch.Tensor | None, int]:
    """cu_seqlens as a dense int64 tensor, and the number of sequences."""
    if cu_seqlens is None:
        if values.dim() != 2:
            check.fail("gae", "values", "have the shape [B, T]", list(values.shape))
        return None, values.shape[0]
    check.tensor("gae", "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int64, torch.int32):
        check.fail("gae", "cu_seqlens", "be int64 or int32", cu_seqlens.dtype, TypeError)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        check.fail("gae", "cu_seqlens", "have the shape [B + 1]", list(cu_seqlens.shape))
    check.device("gae", "cu_seqlens", cu_seqlens, values.device, "values")
    if values.dim() != 1:
        check.fail("gae", "values", "have the shape [N] if cu_seqlens is given", list(values.shape))
    return cu_seqlens.to(torch.int64).contiguous(), cu_seqlens.shape[0] - 1


def _decays(gamma: Any, lam: Any, sequences: int, values: torch.Tensor) -> tuple[float, float, torch.Tensor | None]:
    """gamma, lam (1 if it is a tensor), and lam as a tensor (None if it is a number)."""
    gamma = check.finite("gae", "gamma", gamma)
    if not isinstance(lam, torch.Tensor) or lam.dim() == 0 or lam.device.type == "meta":
        return gamma, _lam(gamma, "lam", lam), None
    check.floating("gae", "lam", lam)
    check.shape("gae", "lam", lam, torch.Size([sequences]), _OF_SEQUENCES)
    check.device("gae", "lam", lam, values.device, "values")
    return gamma, 1.0, lam


def _lam(gamma: float, argument: str, lam: Any) -> float:
    lam = check.finite("gae", argument, lam)
    check.finite("gae", f"gamma * {argument}", gamma * lam)
    return lam


def length_adaptive_lam(mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """A lambda for each sequence that grows with its length: 1 - 1 / max(alpha * n_b, 1).

    Args:
        mask: [B, T] bool, int or float, nonzero where a token counts; n_b is their number in sequence b.
        alpha: finite in float32 and not negative. 0 gives a lambda of 0 for every sequence.

    Returns:
        [B] float32 in [0, 1], for `gae(lam=...)`: 0 for sequences of at most 1 / alpha tokens, also for empty ones.

    Raises:
        TypeError: mask is complex, quantized or not dense, or alpha is not a number.
        ValueError: mask is not [B, T], or alpha is negative or not finite.

    Source: Yue et al. 2025 (arXiv:2504.05118), length-adaptive GAE.
    """
    check.weights("length_adaptive_lam", mask)
    if mask.dim() != 2:
        check.fail("length_adaptive_lam", "mask", "have the shape [B, T]", list(mask.shape))
    alpha = check.not_negative("length_adaptive_lam", "alpha", alpha)
    lengths = (mask != 0).sum(1, dtype=torch.float32)
    return (1.0 - 1.0 / (alpha * lengths).clamp(min=1.0)).clamp(0.0, 1.0)
