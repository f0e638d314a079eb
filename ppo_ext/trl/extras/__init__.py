"""The PPO part of `trl.extras`."""

from typing import TYPE_CHECKING

from .._names import module_getattr
from . import best_of_n_sampler
from .best_of_n_sampler import BestOfNSampler

__all__ = ["BestOfNSampler", "best_of_n_sampler"]

if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
