"""What ppo_loss_from_hidden and ppo_loss_from_logits share: the loss of tokens whose log-probabilities and entropies are
known, and its gradients before the last token is."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from . import _ppo_options_run, check
from ._ppo_options import CHOICES, NUMBERS, STAT_NAMES
from ._ppo_options_run import _backward, _forward

_TENSORS = ("old_logprobs", "advantages", "vpreds", "values", "returns", "weights", "ref_logprobs")
# The arguments of an operator that come after those of the log-probabilities, and what it returns first.
ARGUMENTS = (
    "Tensor old_logprobs, Tensor advantages, Tensor? vpreds, Tensor? values, Tensor? returns, Tensor mask,"
    " Tensor? weights, Tensor? ref_logprobs, Tensor? denominator, Tensor? row_counts, float[] numbers"
)
RESULTS = "Tensor loss, Tensor stats, Tensor of_tokens, Tensor grad_vpreds"
_OF_TOKENS = 8  # so many of them have the shape of the tokens
_NUMBERS = (*NUMBERS, *CHOICES)


class Tokens(NamedTuple):
    """The values of ARGUMENTS: what `ppo_loss` takes, but for log-probabilities and entropy."""

    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    vpreds: torch.Tensor | None
    values: torch.Tensor | None
    returns: torch.Tensor | None
    mask: torch.Tensor
    weights: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    denominator: torch.Tensor | None
    row_counts: torch.Tensor | None
    numbers: list[float]

    def number(self, name: str) -> float:
        return self.numbers[_NUMBERS.index(name)]

    def with_number(self, name: str, x: float) -> "Tokens":
        place = _NUMBERS.index(name)
        return self._replace(numbers=[*self.numbers[:place], x, *self.numbers[place + 1 :]])

    def choice(self, name: str) -> str:
        return CHOICES[name][int(self.number(name))]

    def of_rows(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> "Tokens":
        """The tokens that `rows` selects of each tensor, for `row_gradients`."""
        found: list[Any] = list(self)
        found[:_OF_TOKENS] = (None if x is None else rows(x) for x in found[:_OF_TOKENS])
        return Tokens(*found)


class TokenLoss(NamedTuple):
    """The results of an operator, but for the gradients of what the logits are made of.

    loss: []. stats: one number for each of the names that `prepare` returns. of_tokens: [2, ...], the advantages and ratios
    of the tokens that count. grad_vpreds: of the tokens' shape, without entries if there is no critic.
    """

    loss: torch.Tensor
    stats: torch.Tensor
    of_tokens: torch.Tensor
    grad_vpreds: torch.Tensor


def fake_results(tokens: Tokens) -> TokenLoss:
    logprobs = tokens.old_logprobs
    loss, stats, of_tokens, _ = _outputs(logprobs, logprobs, tokens)
    return TokenLoss(loss, stats, of_tokens, logprobs.new_empty(0 if tokens.vpreds is None else logprobs.shape))


def prepare(op: str, given: dict[str, Any], labels: torch.Tensor, dtype: torch.dtype) -> tuple[Tokens, tuple]:
    """The arguments of a loss, by name, checked and in the forms of an operator, and the names of the statistics. dtype:
    that of the log-probabilities."""
    given = given | {"labels": labels}
    found: dict[str, Any] = _ppo_options_run.prepare(op, given, _TENSORS, "labels", dtype)
    for name, x in found.items():
        check.no_tangent(op, name, x)
    plan = _ppo_options_run.plan_of(op, given | {"entropy": labels})
    first, mask = found["old_logprobs"], found["mask"]
    numbers, total, counts = _ppo_options_run.denominators(op, given, "labels", first, mask, plan.numbers)
    tensors: list[Any] = [found.get(name) for name in Tokens._fields[:_OF_TOKENS]]
    return Tokens(*[*tensors, total, counts, numbers]), plan.names


# ---- the loss -------------------------------------------------------------------------------------------------------


def _outputs(logprobs: torch.Tensor, entropy: torch.Tensor | None, tokens: Tokens) -> tuple[torch.Tensor, ...]:
    """Those of the operator of ppo_loss."""
    dtype = tokens.old_logprobs.dtype
    given = (None if x is None else x.to(dtype).contiguous() for x in (logprobs, entropy))
    return _forward(next(given), *tokens[:_OF_TOKENS], next(given), *tokens[_OF_TOKENS:])


def by_sequence(tokens: Tokens) -> bool:
    """Whether a token's gradient depends on the log-probabilities of its whole sequence."""
    return tokens.choice("ratio_level") != "token"


def shares(tokens: Tokens) -> torch.Tensor:
    """What the terms of each token are multiplied by in the loss, which is known before the first log-probability: the
    gradient of an entropy that is added. Refuses what the operator of ppo_loss does."""
    if len(tokens.numbers) != len(_NUMBERS):
        check.fail("ppo_loss", "numbers", f"have {len(_NUMBERS)} entries", len(tokens.numbers))
    plain = tokens.with_number("entropy_coef", -1.0).with_number("ratio_threshold", math.inf)
    logprobs = tokens.old_logprobs
    loss, stats, _, grads = _outputs(logprobs, torch.zeros_like(logprobs), plain)
    return _backward(torch.ones_like(loss), stats, grads, tokens.vpreds is not None, False, True)[2]


def row_gradients(
    logprobs: torch.Tensor, tokens: Tokens, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of the loss with respect to some rows' log-probabilities and entropies (None if it has none), before
    it is known whether the ratio guard skips the minibatch. tokens: of `of_rows`; share: these rows of `shares`."""
    alone = tokens._replace(denominator=None, row_counts=None).with_number("aggregation", 0.0)
    grad = _outputs(logprobs, None, alone.with_number("entropy_coef", 0.0))[3][0]
    coefficient = tokens.number("entropy_coef")
    of_entropy = None if coefficient == 0 else (-coefficient * share).to(logprobs.dtype)
    return torch.where(share == 0, 0, grad * share).to(logprobs.dtype), of_entropy


def whole_loss(
    logprobs: torch.Tensor, entropy: torch.Tensor, tokens: Tokens
) -> tuple[TokenLoss, tuple[torch.Tensor, torch.Tensor | None]]:
    """The loss of all tokens with its statistics, and its gradients with respect to the log-probabilities and entropies
    (None if it has none)."""
    loss, stats, of_tokens, grads = _outputs(logprobs, entropy, tokens)
    critic, bonus = tokens.vpreds is not None, tokens.number("entropy_coef") != 0
    of_logprobs, of_vpreds, of_entropy = _backward(torch.ones_like(loss), stats, grads, critic, critic, bonus)
    row_grads = of_logprobs.to(logprobs.dtype), of_entropy.to(logprobs.dtype) if bonus else None
    return TokenLoss(loss, stats, of_tokens, of_vpreds), row_grads


def zero_if_skipped(stats: torch.Tensor, gradients: Iterable[torch.Tensor], tokens: Tokens) -> None:
    """The gradients that were made before the ratio guard could decide."""
    if tokens.number("ratio_threshold") == math.inf:
        return
    skipped = stats[STAT_NAMES.index("policy/skipped")] != 0
    if stats.device.type != "cpu" or skipped:
        for grad in gradients:
            grad.masked_fill_(skipped, 0)


def named_stats(found: TokenLoss, names: tuple) -> dict[str, torch.Tensor]:
    return _ppo_options_run.named_stats(names, found.stats, found.of_tokens)


# ---- the backward pass ----------------------------------------------------------------------------------------------


def _graph_is_kept() -> bool:
    """Whether this backward pass may run again; then what was saved must stay as it is."""
    find = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return find is None or find()


def times(grads: list[torch.Tensor | None], grad_loss: torch.Tensor) -> list[torch.Tensor | None]:
    """The saved gradients times that of the loss. A gradient of 0, which masked tokens have, stays 0.

    They are large, so that a graph that is freed gives them away: scaled in place and, on a CPU, where the usual factor
    of 1 is seen, as they are.
    """
    if torch.compiler.is_compiling() or _graph_is_kept():
        return [None if grad is None else product(grad, grad_loss) for grad in grads]
    if grad_loss.device.type != "cpu" or grad_loss.item() != 1:
        for grad in grads:
            if grad is not None:
                _scale(grad, grad_loss)
    return grads


def product(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.where(grad == 0, 0, grad * factor.to(grad.dtype))


def _scale(grad: torch.Tensor, factor: torch.Tensor) -> None:
    """In place, some rows at a time."""
    rows = max(1, (1 << 24) * len(grad) // max(1, grad.numel())) if grad.dim() else 1
    for part in grad.split(rows) if grad.dim() else (grad,):
        part.copy_(product(part, factor))
