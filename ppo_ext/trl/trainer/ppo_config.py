"""`trl.trainer.ppo_config`."""

from typing import TYPE_CHECKING

from ...trainer.config import PPOConfig
from .._names import module_getattr

__all__ = ["PPOConfig"]

if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
