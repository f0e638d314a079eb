"""The pairwise loss of reward models."""

import torch
from torch.nn.functional import logsigmoid


def reward_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margin: torch.Tensor | None = None,
    center_rewards_coefficient: float | None = None,
) -> torch.Tensor:
    """The pairwise (Bradley-Terry) loss.

        -mean(logsigmoid(chosen - rejected - margin)) + center_rewards_coefficient * mean((chosen + rejected)^2)

    Args:
        chosen_rewards, rejected_rewards: [B] or [B, 1] floating.
        margin: [B] or [B, 1]; how much higher the reward of each chosen sample should be. None: 0.
        center_rewards_coefficient: pulls the rewards of a pair towards a sum of 0; 0.01 is usual. None: off.
    Returns:
        0-d tensor of the rewards' dtype.
    Raises:
        ValueError: the arguments do not have one reward (and one margin) per pair, or there is no pair.
    Source: TRL 0.11.4, `RewardTrainer.compute_loss`; there a [B] margin against [B, 1] rewards gives a [B, B] loss.
    """
    return pair_losses(chosen_rewards, rejected_rewards, margin, center_rewards_coefficient).mean()


def pair_losses(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, margin: torch.Tensor | None, center: float | None
) -> torch.Tensor:
    """The summands [B] of `reward_loss`."""
    batch = chosen_rewards.shape[0] if chosen_rewards.ndim else 0
    named = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards, "margin": margin}
    for name, tensor in named.items():
        if tensor is not None and (tuple(tensor.shape) not in {(batch,), (batch, 1)} or batch == 0):
            raise ValueError(
                f"reward_loss: {name} must have one value per pair, [{batch}] or [{batch}, 1] with {batch} > 0, "
                f"got shape {list(tensor.shape)}"
            )
    chosen, rejected = chosen_rewards.reshape(batch), rejected_rewards.reshape(batch)
    losses = -logsigmoid(chosen - rejected - (0.0 if margin is None else margin.reshape(batch)))
    return losses if center is None else losses + center * (chosen + rejected).square()
