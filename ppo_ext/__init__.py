"""PPO for language models: the loss path in C++ and CUDA, and a trainer with TRL's classic step loop."""

import importlib

from .ops.check_labels import check_labels
from .ops.full_kl import full_kl
from .ops.gae import gae
from .ops.kl_rewards import kl_rewards
from .ops.logprobs import logprobs, logprobs_and_entropy
from .ops.masked import masked_mean, masked_var, masked_whiten
from .ops.ppo_loss import ppo_loss

__version__ = "0.1.0"

# Imported on first use, so that the ops do not pull in transformers.
_LAZY = {
    "PPOConfig": "trainer.config",
    "PPOTrainer": "trainer.ppo",
    "FixedKLController": "trainer.kl_controller",
    "AdaptiveKLController": "trainer.kl_controller",
    "AutoModelForCausalLMWithValueHead": "models.auto",
    "AutoModelForSeq2SeqLMWithValueHead": "models.auto",
    "PreTrainedModelWrapper": "models.auto",
    "create_reference_model": "models.auto",
    "RewardConfig": "supervised.reward_trainer",
    "RewardTrainer": "supervised.reward_trainer",
    "normalize_rewards": "supervised.reward_scores",
    "reward_loss": "supervised.reward_loss",
    "reward_scores": "supervised.reward_scores",
    "SFTConfig": "supervised.sft",
    "SFTTrainer": "supervised.sft",
}

__all__ = [
    "check_labels",
    "full_kl",
    "gae",
    "kl_rewards",
    "logprobs",
    "logprobs_and_entropy",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "ppo_loss",
    *_LAZY,
]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(f"ppo_ext.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'ppo_ext' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
