"""The exponent of a power law, cost = factor * size^exponent, by least squares on both logarithms."""

import math


def exponent(sizes, costs, *, upper=0.5):
    """The exponent over the upper part of the range of sizes, where the fixed cost of a call is negligible."""
    points = sorted(zip(sizes, costs))[-max(2, math.ceil(upper * len(sizes))) :]
    if len({size for size, _ in points}) < 2:
        raise ValueError(f"exponent: sizes must be two or more different numbers, got {list(sizes)}")
    x, y = [math.log(size) for size, _ in points], [math.log(cost) for _, cost in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)
