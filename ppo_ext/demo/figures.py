"""What samples are worth, in numbers."""

import math
import re

import torch


def interval(values: torch.Tensor) -> float:
    """Half the width of the 95 % confidence interval of the mean (normal approximation)."""
    return 1.96 * values.double().std().item() / math.sqrt(len(values))


def distinct_2(texts: list[str]) -> float:
    """Different word pairs divided by all word pairs, over all texts (Li et al. 2016); 0.0 where there are none."""
    pairs: list[tuple[str, str]] = []
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        pairs += zip(words, words[1:], strict=False)
    return len(set(pairs)) / len(pairs) if pairs else 0.0
