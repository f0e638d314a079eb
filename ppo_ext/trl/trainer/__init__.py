"""The part of `trl.trainer` that trains by PPO, by supervised fine-tuning, or a reward model."""

from typing import TYPE_CHECKING

from .._names import module_getattr
from ..import_utils import is_diffusers_available
from . import base, ppo_config, ppo_trainer, utils
from .base import BaseTrainer
from .ppo_config import PPOConfig
from .ppo_trainer import PPOTrainer
from .utils import AdaptiveKLController, FixedKLController, RunningMoments, disable_dropout_in_model

if TYPE_CHECKING:
    from ...supervised.reward_trainer import RewardConfig, RewardTrainer, compute_accuracy
    from ...supervised.sft import SFTConfig, SFTTrainer

__all__ = [
    "AdaptiveKLController",
    "BaseTrainer",
    "FixedKLController",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "RunningMoments",
    "SFTConfig",
    "SFTTrainer",
    "base",
    "compute_accuracy",
    "disable_dropout_in_model",
    "is_diffusers_available",
    "ppo_config",
    "ppo_trainer",
    "utils",
]

# Imported on first use: transformers.Trainer takes seconds to import, and a PPO script does not need it.
LAZY = {
    "RewardConfig": "ppo_ext.supervised.reward_trainer",
    "RewardTrainer": "ppo_ext.supervised.reward_trainer",
    "SFTConfig": "ppo_ext.supervised.sft",
    "SFTTrainer": "ppo_ext.supervised.sft",
}

if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__, {**LAZY, "compute_accuracy": "ppo_ext.supervised.reward_trainer"})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
