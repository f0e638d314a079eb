"""Generalised advantage estimation as one reverse scan."""

from . import _native, check, reference

_gae, _gae_name = _native.define(
    "_gae(Tensor values, Tensor rewards, Tensor? mask, float gamma, float lam) -> (Tensor advantages, Tensor returns)"
)


@_native.register_fake(_gae_name)
def _(values, rewards, mask, gamma, lam):
    return values.new_empty(values.shape), values.new_empty(values.shape)


def gae(values, rewards, mask=None, *, gamma=1.0, lam=0.95):
    """Advantages and returns of a batch of sequences.

        delta_t = rewards_t + gamma * values_{t+1} - values_t
        advantages_t = delta_t + gamma * lam * advantages_{t+1}
        returns_t = advantages_t + values_t

    with t + 1 the next token that counts; past the last one both the value and the advantage are 0.

    Args:
        values: [B, T] float32, bfloat16, float16 or float64, V of the state before each token.
        rewards: [B, T], reward received for each token.
        mask: [B, T] bool, int or float, nonzero where a token counts; None counts all. The recursion runs over the
            counted tokens as if the others were deleted, also where they stand between counted ones (tool output).
        gamma, lam: discount and GAE's lambda; both and their product finite in float32.

    Returns:
        (advantages, returns), each [B, T] float32 (float64 if an input is float64); 0 where the mask is 0.

    Raises:
        TypeError: an input is not of a floating dtype, a tensor is not dense, or gamma or lam is no number. ValueError:
        shapes or devices do not match, the shape is not [B, T], or gamma, lam or their product is not finite.

    Notes:
        Not differentiable: inputs are detached. Masked inputs are never read into a result. Rows of length 0 and
        batches of 0 give empty results. On the CPU the scan is the serial recurrence; on CUDA it is a parallel scan
        in a fixed order, which rounds differently; each gives the same bits on every run.

    Source: Schulman et al. 2015 (arXiv:1506.02438), equation 16; TRL 0.11.4, `PPOTrainer.compute_advantages`, to which
    it is equal wherever the mask is one block. (TRL lets holes in the mask decay the advantage.)
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
