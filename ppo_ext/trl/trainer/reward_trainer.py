"""`trl.trainer.reward_trainer`."""

from typing import TYPE_CHECKING

from ...supervised.reward_trainer import RewardTrainer
from .._names import module_getattr

__all__ = ["RewardTrainer"]

if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
