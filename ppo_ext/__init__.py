"""PPO for language models: the loss path in C++ and CUDA, and a trainer with TRL's classic step loop."""

import importlib
from typing import TYPE_CHECKING

from .ops.check_labels import check_labels
from .ops.full_kl import full_kl
from .ops.gae import gae, length_adaptive_lam
from .ops.kl_rewards import kl_rewards
from .ops.linear_logprobs import linear_logprobs, linear_logprobs_and_entropy, linear_statistics
from .ops.logprobs import logprobs, logprobs_and_entropy
from .ops.masked import masked_mean, masked_var, masked_whiten
from .ops.ppo_loss import ppo_loss
from .ops.ppo_loss_from_hidden import ppo_loss_from_hidden
from .ops.ppo_loss_from_logits import ppo_loss_from_logits
from .ops.rollout_weights import rollout_weights

if TYPE_CHECKING:
    from .integrations.trl import patch_trl, unpatch_trl
    from .models.auto import (
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
        PreTrainedModelWrapper,
        create_reference_model,
    )
    from .supervised.reward_loss import reward_loss
    from .supervised.reward_scores import normalize_rewards, reward_scores
    from .supervised.reward_trainer import RewardConfig, RewardTrainer
    from .supervised.sft import SFTConfig, SFTTrainer
    from .trainer.config import PPOConfig
    from .trainer.kl_controller import AdaptiveKLController, FixedKLController
    from .trainer.ppo import PPOTrainer

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "FixedKLController",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "check_labels",
    "create_reference_model",
    "full_kl",
    "gae",
    "kl_rewards",
    "length_adaptive_lam",
    "linear_logprobs",
    "linear_logprobs_and_entropy",
    "linear_statistics",
    "logprobs",
    "logprobs_and_entropy",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "normalize_rewards",
    "patch_trl",
    "ppo_loss",
    "ppo_loss_from_hidden",
    "ppo_loss_from_logits",
    "reward_loss",
    "reward_scores",
    "rollout_weights",
    "unpatch_trl",
]

# The modules of the names above that need transformers; they are imported on first use, so that the ops work without it.
_LAZY = {
    "AdaptiveKLController": "trainer.kl_controller",
    "AutoModelForCausalLMWithValueHead": "models.auto",
    "AutoModelForSeq2SeqLMWithValueHead": "models.auto",
    "FixedKLController": "trainer.kl_controller",
    "PPOConfig": "trainer.config",
    "PPOTrainer": "trainer.ppo",
    "PreTrainedModelWrapper": "models.auto",
    "RewardConfig": "supervised.reward_trainer",
    "RewardTrainer": "supervised.reward_trainer",
    "SFTConfig": "supervised.sft",
    "SFTTrainer": "supervised.sft",
    "create_reference_model": "models.auto",
    "normalize_rewards": "supervised.reward_scores",
    "patch_trl": "integrations.trl",
    "reward_loss": "supervised.reward_loss",
    "reward_scores": "supervised.reward_scores",
    "unpatch_trl": "integrations.trl",
}

if not TYPE_CHECKING:  # a type checker would accept any name because of it

    def __getattr__(name):
        if name in _LAZY:
            return getattr(importlib.import_module(f"ppo_ext.{_LAZY[name]}"), name)
        raise AttributeError(f"module 'ppo_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
