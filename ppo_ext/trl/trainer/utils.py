"""The part of `trl.trainer.utils` that PPO and reward models need."""

from ...supervised.reward_trainer import RewardDataCollatorWithPadding, compute_accuracy
from ...trainer.kl_controller import AdaptiveKLController, FixedKLController
from ...trainer.stats import RunningMoments

__all__ = [
    "AdaptiveKLController",
    "FixedKLController",
    "RewardDataCollatorWithPadding",
    "RunningMoments",
    "compute_accuracy",
]
