"""The gold metric: by it the simulated labeller votes, and by it the result is judged.

PPO never sees it. It enters training only through noisy preferences, from which the reward model learns.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch

from .flesch import flesch

FLESCH_NOISE = 10.0  # points of difference at which a labeller is right 73 times of 100
RELATIVE_NOISE = 0.43  # the same for any other metric, in standard deviations; 10 points are .43 sd of Flesch
_PROBE = ["The first text is short.", "The second text is a little longer than the first."]


class GoldMetric:
    """A named function of texts; whatever is wrong with its results is reported as a ValueError.

    Args:
        name: for tables and plots.
        function: list of texts -> list of numbers.
        noise: scale of the labeller's noise, in the metric's unit; None: `RELATIVE_NOISE` standard deviations of the
            labelled texts.
    """

    def __init__(self, name: str, function: Callable[[list[str]], list[float]], noise: float | None = None):
        self.name = name
        self.function = function
        self.noise = noise

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Gold scores [N] float64 of N texts."""
        try:
            scores = list(self.function(texts))
        except Exception as error:
            raise ValueError(
                f"demo: scorer {self.name} must not fail on any text, got {type(error).__name__}: {error}"
            ) from error
        if len(scores) != len(texts):
            raise ValueError(
                f"demo: scorer {self.name} must return one number per text, got {len(scores)} for {len(texts)} texts"
            )
        for text, value in zip(texts, scores, strict=True):
            if not _is_number(value) or not math.isfinite(value):
                raise ValueError(f"demo: scorer {self.name} must return finite numbers, got {value!r} for {text!r}")
        return torch.tensor([float(value) for value in scores], dtype=torch.float64)

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
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"demo: --scorer must be package.module:function, got {path!r}")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a user's module may raise anything while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"demo: --scorer must be importable, got {path!r} ({reason})") from error
    return GoldMetric(path, _by_list(path, function))


def _by_list(path: str, function: Callable) -> Callable[[list[str]], list[float]]:
    """The function as one that takes lists; a call with two texts finds out which kind it is."""
    failures = []
    try:
        scores = function(list(_PROBE))
        if hasattr(scores, "__len__") and len(scores) == len(_PROBE) and all(map(_is_number, scores)):
            return function
        failures.append(f"{scores!r} for a list of {len(_PROBE)} texts")
    except Exception as error:
        failures.append(f"{type(error).__name__}: {error} for a list of texts")
    try:
        score = function(_PROBE[0])
        if _is_number(score):
            return lambda texts: [function(text) for text in texts]
        failures.append(f"{score!r} for one text")
    except Exception as error:
        failures.append(f"{type(error).__name__}: {error} for one text")
    raise ValueError(
        f"demo: --scorer must return a number for a text or a list of numbers for a list of texts, got from {path} "
        + " and ".join(failures)
    )


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str)
