"""Log-probabilities of tokens from what the language model's head reads, in a forward pass that makes no logits."""

from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops.linear_logprobs import linear_logprobs, linear_logprobs_and_entropy


class TokenRequest(NamedTuple):
    """The tokens that a forward pass has to score; the head's output is scaled and capped as in `linear_logprobs`."""

    labels: torch.Tensor  # [B, T] int64: column t holds the token that is predicted there
    mask: torch.Tensor  # [B, T], nonzero where a token counts
    rows: torch.Tensor  # [N] int64: the tokens that count, as indices into labels.flatten()
    logit_scale: float
    softcap: float | None
    with_entropy: bool
    entropy_gradient: bool = False  # whether the entropy is differentiable


class TokenScores(NamedTuple):
    """The results, each [B, T] float32 (float64 of a float64 model) and 0 where no token counts."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None  # if asked for; a constant for autograd unless entropy_gradient


class HeadInput:
    """A context in which the head's input is kept, and the head is given no row of it, so that it makes no logits.

    It is a forward pre-hook on the head. The head's own module, its autograd graph and its other pre-hooks stay in use.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.hidden: torch.Tensor | None = None

    def __enter__(self) -> "HeadInput":
        self.handle = self.head.register_forward_pre_hook(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (self.hidden,) = inputs
        return self.hidden[..., :0, :]


def token_scores(head: Any, hidden: torch.Tensor | None, request: TokenRequest) -> TokenScores:
    """Scores the tokens from the head's input [B, T, H]. Under autocast, input and weight are rounded as the head would.

    Raises: ValueError if the head's input has other tokens than the labels.
    """
    shape = request.labels.shape
    if hidden is None or hidden.shape[:-1] != shape:
        got = "none" if hidden is None else list(hidden.shape)
        raise ValueError(f"PPOTrainer: the head must read [{shape[0]}, {shape[1]}, hidden size], got {got}")
    hidden = hidden.flatten(0, 1).index_select(0, request.rows)
    weight, bias = head.weight, head.bias
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
    labels = request.labels.flatten().index_select(0, request.rows)
    op = linear_logprobs_and_entropy if request.with_entropy else linear_logprobs
    found = op(hidden, weight, labels, bias=bias, logit_scale=request.logit_scale, softcap=request.softcap)
    logprobs, entropy = found if isinstance(found, tuple) else (found, None)
    if entropy is not None:
        entropy = _spread(entropy if request.entropy_gradient else entropy.detach(), request)
    return TokenScores(_spread(logprobs, request), entropy)


def _spread(x: torch.Tensor, request: TokenRequest) -> torch.Tensor:
    """[N] -> [B, T]."""
    spread = x.new_zeros(request.labels.numel()).index_copy(0, request.rows, x)
    return spread.view(request.labels.shape).masked_fill(request.mask == 0, 0)
