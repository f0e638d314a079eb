"""`trl.trainer.ppo_trainer`."""

from typing import TYPE_CHECKING

from ...trainer.ppo import PPOTrainer
from .._names import module_getattr

__all__ = ["PPOTrainer"]

if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
