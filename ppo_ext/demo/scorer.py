"""A function of texts that gives each a number, and every way in which a user's can be wrong."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch

_PROBE = ["The first text is short.", "The second text is a little longer than the first."]


class Scorer:
    """A function of texts with its name; every way it can fail is a ValueError that says so.

    Args:
        name: for tables and plots.
        function: list of texts -> list of numbers.
    """

    def __init__(self, name: str, function: Callable[[list[str]], list[float]]):
        self.name = name
        self.function = function

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Scores [N] float64 of N texts."""
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


def load_function(path: str) -> Callable[[list[str]], list[float]]:
    """The function at "package.module:function", taken as one of lists whether it scores texts or lists of texts.

    Raises ValueError if it cannot be imported, or if what it gives for two short texts are no finite numbers.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"demo: --scorer must be package.module:function, got {path!r}")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a user's module may raise anything while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"demo: --scorer must be importable, got {path!r} ({reason})") from error
    by_list = _by_list(path, function)
    Scorer(path, by_list)(list(_PROBE))  # NaN or infinity is refused here, before any training
    return by_list


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
