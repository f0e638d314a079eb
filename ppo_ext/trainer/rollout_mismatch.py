"""Why the log-probabilities of the engine that sampled are others than the policy's own: tests of the likely causes.

a is the policy's log-probability of a token and b the engine's, both [B, T-1] with a mask. A cause is named if what is left
after it has been undone is a small part of the difference.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..ops.logprobs import logprobs

TOLERANCE = 0.02  # nats per token, on average: half precision and other kernels stay below
_EXPLAINED = 0.2  # of the difference may be left
_NOISE = 0.15  # nats per token, the most that is taken for rounding errors
TOKENS = 64  # of which the whole distribution is looked at
_CUTS = 1024  # the largest top_k that is tried


class Distributions(NamedTuple):
    """Of some of the tokens that count."""

    logits: torch.Tensor  # [N, V]
    labels: torch.Tensor  # [N]
    given: torch.Tensor  # [N], the engine's log-probabilities


class Fit(NamedTuple):
    """What is left of the difference, in nats per token, if the engine samples like this."""

    left: float
    temperature: float
    cut: str  # "", "top_k = 5" or "top_p = 0.90"


def difference(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> float:
    """The mean of |b - a| over the tokens that count; 0 where none does. One host/device sync."""
    counted = mask != 0
    return (torch.where(counted, b - a, 0.0).abs().sum() / counted.sum().clamp(min=1)).item()


def likely_cause(
    a: torch.Tensor,
    b: torch.Tensor,
    mask: torch.Tensor,
    lengths: Sequence[Sequence[int]],
    distributions: Distributions | None,
) -> str:
    """In words. lengths: of each sample, those that padding may follow: of the query, and of query and response.

    distributions: None where they cannot be had; then temperature and a cut of the vocabulary are not told apart.
    """
    size = difference(a, b, mask)
    for cause in (_shift(a, b, mask, size), _padding(a, b, mask, lengths), _sampling(distributions)):
        if cause:
            return cause
    d = (b - a)[mask != 0]
    if (d > -TOLERANCE / 2).double().mean() > 0.99:
        return "top_k, top_p or min_p: none is smaller, so they seem to be renormalised over a part of the vocabulary"
    if size < _NOISE and d.mean().abs() < size / 2:
        noise = "half precision or other kernels in the engine, or with weights that are a few updates old"
        return f"precision: both signs are about as frequent, as with {noise}"
    return (
        "none of temperature, top_k, top_p, padding, shift and precision; the engine may have other weights or tokens"
    )


def _shift(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor, size: float) -> str:
    both = mask[:, 1:] * mask[:, :-1]
    pairs = {"before": (a[:, :-1], b[:, 1:]), "after": (a[:, 1:], b[:, :-1])}
    for where, (own, given) in pairs.items():
        if both.any() and difference(own, given, both) < _EXPLAINED * size:
            return f"a shift: each is about the token {where} the one at its place"
    return ""


def _padding(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor, lengths: Sequence[Sequence[int]]) -> str:
    counted = [i for i, row in enumerate((mask != 0).any(dim=1).tolist()) if row]
    rows = torch.tensor([difference(a[i], b[i], mask[i]) for i in counted], device="cpu")
    for of_rows in lengths:
        padded = torch.tensor([of_rows[i] < max(of_rows) for i in counted], device="cpu")
        if not padded.any():
            continue
        least, most = rows[padded].min(), rows[~padded].max()
        if most < TOLERANCE and least > TOLERANCE and most < _EXPLAINED * least:
            return "padding: all samples differ but the longest, so the engine seems to read the padding of the others"
    return ""


# ---- temperature, top_k, top_p ---------------------------------------------------------------------------------------


def _sampling(x: Distributions | None) -> str:
    if x is None or not len(x.labels):
        return ""
    descending = x.logits.sort(dim=-1, descending=True)[0]
    size = (x.given - logprobs(x.logits, x.labels)).abs().mean().item()
    for fit in (_best_temperature(x), _fit(x, 1.0, descending), _best_temperature(x, descending)):
        if fit.left < _EXPLAINED * size:
            found = [] if fit.temperature == 1.0 else [f"a temperature of {fit.temperature:.2f}"]
            found += [f"{fit.cut}, renormalised"] if fit.cut else []
            return f"{' and '.join(found)}: they are the policy's own with that"
    return ""


def _best_temperature(x: Distributions, descending: torch.Tensor | None = None) -> Fit:
    """The best of temperatures from 0.1 to 10, in steps of 12 %, then of finer and finer ones. descending: see `_fit`."""
    best, step = Fit(float("inf"), 1.0, ""), 10**0.05
    grid = [10 ** (i / 20) for i in range(-20, 21)]
    for _ in range(5):
        best = min([best, *(_fit(x, temperature, descending) for temperature in grid)])
        step **= 1 / 3
        grid = [best.temperature * step**i for i in (-2, -1, 1, 2)]
    return best


def _fit(x: Distributions, temperature: float, descending: torch.Tensor | None = None) -> Fit:
    """descending: the sorted logits [N, V], by which the best cut of the vocabulary is found too; None: no cut."""
    left = x.given - logprobs(x.logits, x.labels, temperature=temperature)
    if descending is None:
        return Fit(left.abs().mean().item(), temperature, "")
    sums = (descending.float() / temperature).softmax(dim=-1).cumsum(dim=-1)  # what top_k = 1, 2, ... keep
    shares = torch.arange(5, 100, device=sums.device, dtype=sums.dtype) / 100
    places = torch.searchsorted(sums, shares.expand(len(sums), -1).contiguous()).clamp(max=sums.shape[1] - 1)
    kept = torch.cat([sums[:, : min(sums.shape[1] - 1, _CUTS)], sums.gather(1, places)], dim=1)
    best, i = (left[:, None] + kept.log()).abs().mean(dim=0).min(dim=0)
    by_rank = kept.shape[1] - len(shares)
    cut = f"top_k = {i + 1}" if i < by_rank else f"top_p = {shares[i - by_rank]:.2f}"
    return Fit(best.item(), temperature, cut)
