"""The part of `trl.trainer.utils` that PPO and reward models need."""

from typing import TYPE_CHECKING

import torch

from ...trainer.kl_controller import AdaptiveKLController, FixedKLController
from ...trainer.stats import RunningMoments
from .._names import module_getattr

if TYPE_CHECKING:
    from ...supervised.reward_trainer import RewardDataCollatorWithPadding, compute_accuracy

__all__ = [
    "AdaptiveKLController",
    "FixedKLController",
    "RewardDataCollatorWithPadding",
    "RunningMoments",
    "compute_accuracy",
    "disable_dropout_in_model",
    "exact_div",
]


def disable_dropout_in_model(model: torch.nn.Module) -> None:
    """Sets the probability of every torch.nn.Dropout in the model to 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0


def exact_div(a: int, b: int, custom_error_message: str = "") -> int:
    """a // b; ValueError with the message if b does not divide a."""
    quotient = a // b
    if a != quotient * b:
        raise ValueError(f"{custom_error_message}, inexact division: {a} / {b} = {a / b}")
    return quotient


if not TYPE_CHECKING:  # a type checker would accept any name because of it
    _REWARD = "ppo_ext.supervised.reward_trainer"  # imports transformers.Trainer, which takes seconds
    __getattr__ = module_getattr(__name__, {"RewardDataCollatorWithPadding": _REWARD, "compute_accuracy": _REWARD})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
