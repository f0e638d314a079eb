"""The PPO part of `trl.trainer`."""

from ..trainer.config import PPOConfig
from ..trainer.kl_controller import AdaptiveKLController, FixedKLController
from ..trainer.ppo import PPOTrainer
from ..trainer.stats import RunningMoments

__all__ = ["AdaptiveKLController", "FixedKLController", "PPOConfig", "PPOTrainer", "RunningMoments"]
