"""Generalised advantage estimation as one reverse scan."""

import torch

from . import _native, check, reference

_gae, _gae_name = _native.define(
    "_gae(Tensor values, Tensor rewards, Tensor? mask, float gamma, float lam) -> (Tensor advantages, Tensor returns)"
)


@_native.register_fake(_gae_name)
def _(values, rewards, mask, gamma, lam):
    return values.new_empty(values.shape), values.new_empty(values.shape)


def gae(
    values: torch.Tensor,
    rewards: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation: advantages and returns of a batch of sequences.

        delta_t = rewards_t + gamma * values_{t+1} - values_t
        advantages_t = delta_t + gamma * lam * advantages_{t+1}
        returns_t = advantages_t + values_t

    where t + 1 is the next token that counts; after the last one both the value and the advantage are 0.

    Args:
        values: [B, T] float32, bfloat16, float16 or float64, the value of the state before each token.
        rewards: [B, T], of the same dtypes, the reward for each token.
        mask: [B, T] bool, int or float, nonzero where a token counts; None counts all. Tokens that do not count are
            left out of the recursion as if they were deleted, also between tokens that count (such as the output of a
            tool).
        gamma, lam: the discount and GAE's lambda; both and their product must be finite in float32.

    Returns:
        (advantages, returns), each [B, T] float32 (float64 if an input is float64), 0 where the mask is 0.

    Raises:
        TypeError: an input is not of a floating dtype, a tensor is not dense, or gamma or lam is not a number.
        ValueError: shapes or devices do not match, the shape is not [B, T], or gamma, lam or their product is not
            finite.

    Notes:
        Not differentiable: the inputs are detached. Masked inputs never influence a result. B = 0 and T = 0 give empty
        results. Sums run in float32 (float64 for float64). On the CPU the scan is the serial recurrence; on CUDA it is
        a parallel scan in a fixed order, which rounds differently. On each device the same input gives the same bits.

    Source: Schulman et al. 2015 (arXiv:1506.02438), equation 16; TRL 0.11.4, `PPOTrainer.compute_advantages`. The two
    are equal where the tokens that count are one block.
    TRL lets the advantage decay through masked tokens in between.
    """
    check.floating("gae", "values", values)
    check.floating("gae", "rewards", rewards)
    if values.dim() != 2:
        check.fail("gae", "values", "have the shape [B, T]", list(values.shape))
    check.shape("gae", "rewards", rewards, values.shape, "values")
    check.device("gae", "rewards", rewards, values.device, "values")
    gamma, lam = check.finite("gae", "gamma", gamma), check.finite("gae", "lam", lam)
    check.finite("gae", "gamma * lam", gamma * lam)
    if mask is not None:
        mask = check.mask("gae", mask, values.shape, values.device, "values").contiguous()
    values, rewards = check.same_dtype(values.detach(), rewards.detach())
    if not _native.available(values.device.type):
        return reference.gae(values, rewards, mask, gamma=gamma, lam=lam)
    return _gae(values.contiguous(), rewards.contiguous(), mask, gamma, lam)
