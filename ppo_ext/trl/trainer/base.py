"""`trl.trainer.base`: the class that programs check a trainer against."""

from abc import ABC
from typing import TYPE_CHECKING

from ...trainer.ppo import PPOTrainer
from .._names import module_getattr

__all__ = ["BaseTrainer"]


class BaseTrainer(ABC):  # noqa: B024
    """Base of trainers with a `step`, for programs that derive their own from it. `PPOTrainer` counts as one."""

    def __init__(self, config):
        self.config = config

    def step(self, *args):
        raise NotImplementedError("BaseTrainer.step: a subclass must define it")

    def loss(self, *args):
        raise NotImplementedError("BaseTrainer.loss: a subclass must define it")

    def compute_rewards(self, *args):
        raise NotImplementedError("BaseTrainer.compute_rewards: a subclass must define it")

    def _save_pretrained(self, save_directory):
        raise NotImplementedError("BaseTrainer._save_pretrained: a subclass must define it")


BaseTrainer.register(PPOTrainer)

if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
