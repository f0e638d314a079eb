"""The part of `trl.trainer` that trains by PPO, by supervised fine-tuning, or a reward model."""

from typing import TYPE_CHECKING, Any

from ...trainer.config import PPOConfig
from ...trainer.kl_controller import AdaptiveKLController, FixedKLController
from ...trainer.ppo import PPOTrainer
from ...trainer.stats import RunningMoments

if TYPE_CHECKING:
    from ...supervised.reward_trainer import RewardConfig, RewardTrainer, compute_accuracy
    from ...supervised.sft import SFTConfig, SFTTrainer

__all__ = [
    "AdaptiveKLController",
    "FixedKLController",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "RunningMoments",
    "SFTConfig",
    "SFTTrainer",
    "compute_accuracy",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: transformers.Trainer takes seconds to import, and a PPO script does not need it.
    if name in ("RewardConfig", "RewardTrainer", "compute_accuracy"):
        from ...supervised import reward_trainer

        return getattr(reward_trainer, name)
    if name in ("SFTConfig", "SFTTrainer"):
        from ...supervised import sft

        return getattr(sft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
