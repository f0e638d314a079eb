"""The PPO part of `trl.trainer`."""

from ..config import PPOConfig
from ..kl import AdaptiveKLController, FixedKLController
from ..stats import RunningMoments
from ..trainer import PPOTrainer

__all__ = ["AdaptiveKLController", "FixedKLController", "PPOConfig", "PPOTrainer", "RunningMoments"]
