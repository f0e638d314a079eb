"""The gold metric: by it the simulated labeller votes, and by it the result is judged.

PPO never sees it. It enters training only through noisy preferences, from which the reward model learns.
"""

from collections.abc import Callable

import torch

from ..scorer import Scorer, load_function
from .flesch import flesch

FLESCH_NOISE = 10.0  # points of difference at which a labeller is right 73 times of 100
RELATIVE_NOISE = 0.43  # the same for any other metric, in standard deviations; 10 points are .43 sd of Flesch


class GoldMetric(Scorer):
    """A scorer by which noisy labellers vote.

    Args:
        noise: labeller noise in the metric's unit; None: `RELATIVE_NOISE` standard deviations of the labelled texts.
    """

    def __init__(self, name: str, function: Callable[[list[str]], list[float]], noise: float | None = None):
        super().__init__(name, function)
        self.noise = noise

    def prefer_first(self, first: torch.Tensor, second: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One noisy vote per pair: first wins with probability sigmoid((first - second) / noise). Returns [N] bool."""
        noise = self.noise or RELATIVE_NOISE * torch.cat([first, second]).std().item()
        if noise == 0.0:
            raise ValueError(f"demo: scorer {self.name} must tell texts apart, got {first[0].item()} for all of them")
        draws = torch.rand(len(first), generator=generator, dtype=torch.float64)
        return draws < torch.sigmoid((first - second) / noise)


def flesch_metric() -> GoldMetric:
    return GoldMetric("Flesch reading ease", lambda texts: [flesch(text) for text in texts], FLESCH_NOISE)


def load_scorer(path: str) -> GoldMetric:
    """The function at "package.module:function", either list of texts -> list of numbers or text -> number."""
    return GoldMetric(path, load_function(path))
