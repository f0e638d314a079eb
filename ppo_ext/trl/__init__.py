"""TRL's names for PPO: `from ppo_ext.trl import PPOTrainer, PPOConfig, ...` where a script says `from trl import ...`.

`ppo_ext.trl.core`, `.models`, `.trainer`, `.extras` and `.import_utils` stand for the modules of TRL with these names.
TRL itself is not needed. Names and signatures follow TRL 0.11.4; the README's table "Differences from TRL" lists where
the numbers differ.
"""

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

__all__ = [
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BestOfNSampler",
    "FixedKLController",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "RunningMoments",
    "SUPPORTED_ARCHITECTURES",
    "core",
    "create_reference_model",
    "extras",
    "import_utils",
    "models",
    "set_seed",
    "trainer",
]
