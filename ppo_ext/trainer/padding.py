"""Padding: on which side it moves no position, and how many padding tokens came in with the samples."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..models import probe
from ..models.limits import Limits, first_position, has_absolute_positions
from .callers import warn
from .rollout import takes_position_ids
from .stopping import end_ids

_PROBED = 3  # columns of padding


def left_padding_is_harmless(pretrained_model: Any) -> bool:
    """Whether padding on the left, which the attention mask hides, leaves every output as it is.

    It does if the model takes position_ids, or has no absolute positions; and it does not if the model carries a state
    from token to token, into which the padding goes as well. In float64 the mask of a row of padding overflows in some
    models of transformers (BLOOM, Gemma 2), which makes NaN of the tokens after it.
    """
    if getattr(pretrained_model, "_is_stateful", False) or pretrained_model.dtype == torch.float64:
        return False
    return _told_positions(pretrained_model) or not has_absolute_positions(pretrained_model)


def _told_positions(pretrained_model: Any) -> bool:
    return takes_position_ids(pretrained_model) and not getattr(pretrained_model.config, "is_encoder_decoder", False)


@torch.no_grad()
def measure_padding(pretrained_model: Any, harmless: bool, tokenizer: Any, limits: Limits, batch_size: int) -> bool:
    """Whether padding on the left is harmless, which a few tokens with padding may show to be wrong.

    Args:
        harmless: what `left_padding_is_harmless` says.
        limits: of the model.
        batch_size: samples of a step on all processes; a single one needs no padding.

    Raises: ValueError for a model that gives samples other numbers with padding on either side.
    """
    pad_id = tokenizer.pad_token_id
    if pad_id is None or (limits.vocabulary is not None and pad_id >= limits.vocabulary):
        return harmless  # `step` refuses to pad
    alone = probe.logits(pretrained_model)
    on_right = probe.logits(pretrained_model, right=_PROBED, pad_id=pad_id)
    if alone is None or on_right is None:
        return harmless
    nudged = probe.logits(pretrained_model, nudged=True)
    if batch_size > 1 and not probe.alike(alone, on_right, nudged):
        raise ValueError(
            "PPOTrainer: model must give a padded sample the logits that it gives the sample alone, got a "
            f"{type(pretrained_model).__name__} with others, whatever the attention mask hides; choose another model, or "
            "batch_size=1 on one process, which needs no padding"
        )
    first = first_position(pretrained_model) if _told_positions(pretrained_model) else None
    on_left = probe.logits(pretrained_model, left=_PROBED, pad_id=pad_id, first_position=first) if harmless else None
    return harmless and (on_left is None or probe.alike(alone, on_left, nudged))


def hidden_in_generation(pretrained_model: Any, pad_id: int | None) -> bool:
    """Whether `generate` goes on after a query padded on the left as after the query alone, on a few tokens.

    Some models give every token its own numbers with such padding, and do not when they read from their cache.
    """
    alone = None if pad_id is None else probe.generated(pretrained_model)
    if alone is None or pad_id is None:
        return True
    padded = probe.generated(pretrained_model, _PROBED, pad_id)
    return padded is None or probe.alike(alone, padded, probe.generated(pretrained_model, nudged=True))


def padding_is_inert(pretrained_model: Any) -> bool:
    """Whether the number of padding columns changes nothing but rounding.

    It does change more where angles follow the longest row (dynamic and long RoPE), where attention is sparse by blocks
    or hashes, and where experts take a share of all tokens.
    """
    return not any(
        key.startswith("expert_capacity") or value in ("dynamic", "longrope", "block_sparse", "lsh")
        for key, value in _settings(pretrained_model.config.to_dict())
    )


def _settings(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values in a config, with the keys that they or the lists around them stand under."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _settings(value, str(name))
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _settings(value, key)
    else:
        yield key, config


def input_side(tokenizer: Any, left_is_harmless: bool) -> str:
    """The side on which inputs are padded: the tokenizer's, unless padding on the left would move positions."""
    return tokenizer.padding_side if left_is_harmless else "right"


@contextmanager
def padding_side(tokenizer: Any, side: str) -> Iterator[None]:
    """Within the block the tokenizer pads on this side."""
    before = tokenizer.padding_side
    tokenizer.padding_side = side
    try:
        yield
    finally:
        tokenizer.padding_side = before


def check_padding_id(where: str, tokenizer: Any, limits: Limits, lengths: Sequence[int]) -> None:
    """ValueError if rows of these lengths have to be padded with an id that the model cannot read."""
    pad, end = tokenizer.pad_token_id, limits.vocabulary
    if pad is not None and end is not None and pad >= end and len(set(lengths)) > 1:
        raise ValueError(
            f"{where}: tokenizer.pad_token_id must lie in {limits.vocabulary_of} [0, {end}), got {pad}; call "
            "resize_token_embeddings(len(tokenizer)) before the trainer is made, or choose another padding token"
        )


class PaddingWatch:
    """Finds padding that a caller has left in the samples, and warns of it once.

    Args:
        tokenizer: whose padding id is looked for.
        pretrained_model: a model whose generation config may name more ids that end a sequence.
    """

    def __init__(self, tokenizer: Any, pretrained_model: Any) -> None:
        self.tokenizer = tokenizer
        self.generation_config = getattr(pretrained_model, "generation_config", None)
        self.warned = False

    def count(
        self,
        queries: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor] = (),
        masks: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """How much padding there is at both ends of queries, and at the end of those tokens of responses that count.

        If the padding's id also begins or ends a sequence, one at an end is none. Once warned, nothing is looked for.

        Returns: [2] int64, without a host/device sync.
        """
        counts = torch.zeros(2, dtype=torch.int64, device=queries[0].device)
        if self.warned or self.tokenizer.pad_token_id is None:
            return counts
        counts[0] = self._count(queries, "beginning") + self._count(queries, "end")
        if responses:
            if masks is not None:
                responses = [ids.masked_fill(mask == 0, -1) for ids, mask in zip(responses, masks, strict=True)]
            counts[1] = self._count(responses, "end")
        return counts

    def _count(self, rows: Sequence[torch.Tensor], where: str) -> torch.Tensor:
        side = "right" if where == "beginning" else "left"
        is_pad = (
            pad_sequence([*rows], batch_first=True, padding_value=-1, padding_side=side) == self.tokenizer.pad_token_id
        )
        is_pad = is_pad.flip(1) if where == "end" else is_pad
        return (is_pad.long().cumprod(dim=1).sum(dim=1) - self._expected()).clamp(min=0).sum()

    def _expected(self) -> int:
        ends = end_ids(self.tokenizer.eos_token_id, getattr(self.generation_config, "eos_token_id", None))
        return int(self.tokenizer.pad_token_id in (self.tokenizer.bos_token_id, *ends))

    def warn(self, where: str, in_queries: int, in_responses: int) -> None:
        """One warning in the life of a trainer; where: the method that was called."""
        if in_queries or in_responses:
            self.warned = True
            warn(
                f"{where}: {in_queries} tokens at the ends of queries and {in_responses} at the ends of responses are "
                f"padding (id {self.tokenizer.pad_token_id}), and count like all others; strip it, as in "
                "ids[attention_mask == 1], or hide it with response_masks",
            )
