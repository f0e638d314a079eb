"""One call of a model on some of the samples, with logits or without, and how the results are put together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..models.token_scores import TokenRequest, TokenScores
from ..ops.full_kl import full_kl
from ..ops.logprobs import logprobs as token_logprobs
from ..ops.logprobs import logprobs_and_entropy
from .rollout import join


class ForwardPass(NamedTuple):
    """What a model says about B responses. T is the padded length; column t is about token t + 1."""

    logprobs: torch.Tensor  # [B, T-1] float32, 0 where the mask is 0
    logits: torch.Tensor | None  # [B, T-1, V] in the model's dtype, if asked for
    values: torch.Tensor  # [B, T-1] float32
    mask: torch.Tensor  # [B, T-1] int64, 1 where a response token counts
    entropy: torch.Tensor | None  # [B, T-1] float32, if asked for; a constant for autograd unless entropy_gradient
    next_values: torch.Tensor | None = None  # [B, T-1], the value after each token, for config.bootstrap_truncated


def forward_chunk(
    model: Callable[..., Any],
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    mask: torch.Tensor,
    return_logits: bool,
    with_entropy: bool,
    inplace_backward: bool,
    entropy_gradient: bool = False,
) -> ForwardPass:
    """One call of the model. Every result has T columns, of which the last one is masked.

    The op gets all T columns of the logits: autograd would make one more tensor of their size for a slice of them.
    """
    logits, _, values = model(**inputs)
    entropy = None
    if with_entropy:
        logprobs, entropy = logprobs_and_entropy(logits, labels, mask=mask, inplace_backward=inplace_backward)
        entropy = entropy if entropy_gradient else entropy.detach()
    else:
        logprobs = token_logprobs(logits, labels, mask=mask, inplace_backward=inplace_backward)
    return ForwardPass(logprobs, logits if return_logits else None, values, mask, entropy)


def scored_chunk(model: Callable[..., Any], inputs: Mapping[str, torch.Tensor], request: TokenRequest) -> ForwardPass:
    """`forward_chunk` without logits."""
    scores, _, values = model(**inputs, token_request=request)
    scores = TokenScores(*scores)  # DDP rebuilds what it returns
    return ForwardPass(scores.logprobs, None, values, request.mask, scores.entropy)


def in_columns(part: ForwardPass, columns: slice, width: int) -> ForwardPass:
    """Results for some columns out of `width` ones, with zeros in the others."""
    first, last, _ = columns.indices(width)
    if last - first == width:
        return part
    return each(part, lambda x: torch.nn.functional.pad(x, (first, width - last)))


def each(part: ForwardPass, change: Callable[[torch.Tensor], torch.Tensor]) -> ForwardPass:
    """The forward pass with every tensor of it changed."""
    columns: list[Any] = [None if x is None else change(x) for x in part]
    return ForwardPass(*columns)


def join_passes(parts: Sequence[ForwardPass]) -> ForwardPass:
    """One forward pass from those of consecutive samples."""
    columns: list[Any] = [None if column[0] is None else join(column) for column in zip(*parts, strict=True)]
    return ForwardPass(*columns)


def divergences(policy: ForwardPass, reference: ForwardPass) -> torch.Tensor:
    """KL(policy || reference) of each token over the whole vocabulary, [B, T-1]."""
    logits, ref_logits, mask = policy.logits, reference.logits, policy.mask
    if logits is None or ref_logits is None:
        raise TypeError("PPOTrainer.step: batched_forward_pass must return logits when return_logits is True, got None")
    return full_kl(logits, ref_logits, mask=mask)
