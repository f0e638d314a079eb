"""`trl.trainer.sft_trainer`."""

from typing import TYPE_CHECKING

from ...supervised.sft import SFTTrainer
from .._names import module_getattr

__all__ = ["SFTTrainer"]

if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
