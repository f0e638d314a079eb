"""TRL's names: write `from ppo_ext.trl import PPOTrainer, PPOConfig, ...` where a script has `from trl import ...`.

`ppo_ext.trl.core`, `.models`, `.trainer`, `.extras` and `.import_utils` take the place of TRL's modules with these names.
TRL itself is not needed. Names and signatures are those of TRL 0.11.4 for PPO, supervised fine-tuning and reward models;
the table "Differences from TRL" in the documentation lists where the numbers differ.
"""

from typing import TYPE_CHECKING, Any

from . import core, extras, import_utils, models, trainer
from .core import set_seed
from .extras import BestOfNSampler
from .models import (
    SUPPORTED_ARCHITECTURES,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
    create_reference_model,
)
from .trainer import AdaptiveKLController, FixedKLController, PPOConfig, PPOTrainer, RunningMoments

if TYPE_CHECKING:
    from .trainer import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

__all__ = [
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BestOfNSampler",
    "FixedKLController",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "RewardConfig",
    "RewardTrainer",
    "RunningMoments",
    "SFTConfig",
    "SFTTrainer",
    "SUPPORTED_ARCHITECTURES",
    "core",
    "create_reference_model",
    "extras",
    "import_utils",
    "models",
    "set_seed",
    "trainer",
]


def __getattr__(name: str) -> Any:
    if name in ("RewardConfig", "RewardTrainer", "SFTConfig", "SFTTrainer"):  # imported on first use
        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
