"""One batch of responses as tensors, which of their tokens count, and the position of each token."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn.utils.rnn import pad_sequence

Spans: TypeAlias = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Rollout:
    """B queries with their responses. T is the padded length; column t of a [B, T-1] field is about token t + 1.

    `mask` is 1 where that token belongs to the response and counts.
    """

    queries: Sequence[torch.Tensor]  # B tensors [query_length] int64
    responses: Sequence[torch.Tensor]  # B tensors [response_length] int64
    response_masks: Sequence[torch.Tensor] | None  # B tensors [response_length], or None: every response token counts
    model_inputs: Mapping[str, torch.Tensor]  # input_ids, attention_mask, ...: each [B, T]
    logprobs: torch.Tensor  # [B, T-1] float32, of the policy that wrote the responses
    values: torch.Tensor  # [B, T-1] float32
    mask: torch.Tensor  # [B, T-1] int64
    advantages: torch.Tensor  # [B, T-1] float32
    returns: torch.Tensor  # [B, T-1] float32
    rollout_logprobs: torch.Tensor | None = None  # [B, T-1] float32, those with which an engine sampled
    weights: torch.Tensor | None = None  # [B, T-1] float32, of the tokens in the policy loss, see `rollout_weights`
    spans: "Spans | None" = None  # see `token_spans`; None: minibatches keep the padding of the whole batch

    def __getitem__(self, rows: list[int]) -> "Rollout":
        """The rollout of some of the samples; `rows` is a list of indices."""
        index = torch.as_tensor(rows, device=self.mask.device)
        masks = self.response_masks
        return Rollout(
            queries=[self.queries[row] for row in rows],
            responses=[self.responses[row] for row in rows],
            response_masks=None if masks is None else [masks[row] for row in rows],
            model_inputs={name: tensor[index] for name, tensor in self.model_inputs.items()},
            logprobs=self.logprobs[index],
            values=self.values[index],
            mask=self.mask[index],
            advantages=self.advantages[index],
            returns=self.returns[index],
            rollout_logprobs=None if self.rollout_logprobs is None else self.rollout_logprobs[index],
            weights=None if self.weights is None else self.weights[index],
            spans=self.spans and {mask: [spans[row] for row in rows] for mask, spans in self.spans.items()},
        )


def token_mask(
    attention_mask: torch.Tensor,
    query_lengths: Sequence[int],
    response_lengths: Sequence[int],
    response_masks: Sequence[torch.Tensor] | None = None,
    is_encoder_decoder: bool = False,
) -> torch.Tensor:
    """Which columns are about a response token that counts.

    Column t is about token t + 1, so a response that starts at token q fills the columns from q - 1 on, and the last
    column is always 0. An encoder-decoder response starts with the decoder's start token, which nothing predicts; as in
    TRL the token after it does not count either.

    Args:
        attention_mask: [B, T] int64, 0 where a token is padding, on either side.
        query_lengths, response_lengths: B ints each. response_masks: B tensors [response_length], nonzero where a token
            counts, or None.

    Returns: [B, T] in the dtype of attention_mask, 0 or 1. No host/device sync.

    Source: TRL 0.11.4, `PPOTrainer.batched_forward_pass`.
    """
    device = attention_mask.device
    first = attention_mask.argmax(dim=1)  # 0 unless the row is padded on the left
    if is_encoder_decoder:
        token_0 = first - 1
        start, end = first + 1, first + attention_mask.sum(dim=1) - 1
    else:
        token_0 = start = first + torch.tensor(query_lengths, device=device) - 1
        end = start + torch.tensor(response_lengths, device=device)
    column = torch.arange(attention_mask.shape[1], device=device)
    counts = (column >= start[:, None]) & (column < end[:, None])
    if response_masks is not None:
        counts &= _in_columns([mask != 0 for mask in response_masks], token_0, attention_mask)
    return counts.to(attention_mask.dtype)


def of_tokens(
    rows: Sequence[torch.Tensor], attention_mask: torch.Tensor, query_lengths: Sequence[int], is_encoder_decoder: bool
) -> torch.Tensor:
    """One number for each response token -> [B, T], in the columns that are about these tokens. Others hold anything."""
    first = attention_mask.argmax(dim=1)
    before = -1 if is_encoder_decoder else torch.tensor(query_lengths, device=attention_mask.device) - 1
    return _in_columns(rows, first + before, attention_mask)


def _in_columns(rows: Sequence[torch.Tensor], token_0: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """rows: one entry for each response token. token_0: [B], the column that is about the first of them."""
    padded = pad_sequence([*rows], batch_first=True)
    column = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return padded.gather(1, (column - token_0[:, None]).clamp(0, padded.shape[1] - 1))


def token_spans(model_inputs: Mapping[str, torch.Tensor]) -> Spans:
    """By the name of each attention mask: the first column that is no padding and the one after the last, of each row.

    One host/device sync.
    """
    masks = {name: mask for name, mask in model_inputs.items() if name.endswith("attention_mask") and mask.dim() == 2}
    ends = [[mask.argmax(dim=1), mask.shape[1] - mask.flip(1).argmax(dim=1)] for mask in masks.values()]
    found = torch.stack([torch.stack(pair, dim=1) for pair in ends]).tolist() if ends else []
    return dict(zip(masks, found, strict=True))


def without_padding(model_inputs: Mapping[str, torch.Tensor], spans: Spans) -> tuple[dict[str, torch.Tensor], slice]:
    """Model inputs without the columns that are padding in every row, and which columns those of the labels are."""
    columns = {
        mask: slice(min(span[0] for span in rows), max(span[1] for span in rows)) for mask, rows in spans.items()
    }
    cut = dict(model_inputs)
    for name, x in model_inputs.items():
        mask = "decoder_attention_mask" if name.startswith("decoder_") else "attention_mask"
        if mask in columns and x.shape[:2] == model_inputs[mask].shape:
            cut[name] = x[:, columns[mask]]
    return cut, columns.get("decoder_attention_mask", columns.get("attention_mask", slice(None)))


def counted_tokens(
    query_lengths: Sequence[int], response_lengths: Sequence[int], width: int, is_encoder_decoder: bool
) -> int | None:
    """How many tokens `token_mask` counts without response masks; None if padding of this width has cut samples off."""
    if is_encoder_decoder:
        return sum(max(length - 2, 0) for length in response_lengths) if width >= max(response_lengths) else None
    longest = max(q + r for q, r in zip(query_lengths, response_lengths, strict=True))
    return sum(response_lengths) if width >= longest else None


def token_rows(mask: torch.Tensor, count: int | None) -> torch.Tensor:
    """Where a mask [B, T] counts, as indices [count] into its flattened form; no host/device sync if count is known.

    Should fewer tokens count, the rest are indices of column T-1, which never does.
    """
    if count is None:
        return mask.flatten().nonzero().squeeze(1)
    return torch.nonzero_static(mask.flatten(), size=count, fill_value=mask.shape[1] - 1).squeeze(1)


def next_tokens(input_ids: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B, T]: the token after each one. The last column has none; it holds 0 and is masked."""
    return torch.nn.functional.pad(input_ids[:, 1:], (0, 1))


def position_ids(attention_mask: torch.Tensor, first: int = 0) -> torch.Tensor:
    """[B, T]: first, first + 1, ... from the first token that is not padding, so that padding on the left shifts none."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0) + first


def takes_position_ids(model: Any) -> bool:
    """Whether the forward of a transformers model, or of the one inside a peft model, has a position_ids argument."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(model.forward).parameters


def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch.cat along the batch; a single tensor is returned as it is, since a copy of logits would be large."""
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors])
