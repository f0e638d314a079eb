"""PPO for language models: the loss path in C++ and CUDA, and a trainer with TRL's classic step loop."""

import importlib

from .full_kl import full_kl
from .gae import gae
from .labels import check_labels
from .logprobs import logprobs, logprobs_and_entropy
from .ppo_loss import ppo_loss
from .rewards import kl_rewards
from .whiten import masked_mean, masked_var, masked_whiten

__version__ = "0.1.0"

# Imported on first use, so that the ops do not pull in transformers.
_LAZY = {
    "PPOConfig": "config",
    "PPOTrainer": "trainer",
    "FixedKLController": "kl",
    "AdaptiveKLController": "kl",
    "AutoModelForCausalLMWithValueHead": "models",
    "AutoModelForSeq2SeqLMWithValueHead": "models",
    "PreTrainedModelWrapper": "models",
    "create_reference_model": "models",
    "RewardConfig": "reward",
    "RewardTrainer": "reward",
    "normalize_rewards": "reward",
    "reward_loss": "reward",
    "SFTConfig": "sft",
    "SFTTrainer": "sft",
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
