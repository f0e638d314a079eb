"""Texts and token sequences as padded batches; shared by supervised fine-tuning and reward models."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

Sample = str | Sequence[int] | torch.Tensor


def encode(
    name: str,
    samples: Sequence[Sample],
    tokenizer=None,
    *,
    max_length: int | None = None,
    min_length: int = 1,
    append_eos: bool = False,
) -> list[torch.Tensor]:
    """Samples as 1-d int64 tensors, cut to `max_length` tokens.

    Args:
        name: how errors call the argument, e.g. "score: sequences".
        append_eos: texts end with the tokenizer's EOS, if it has one; token ids are taken as they are.
    Raises:
        ValueError: no sample, a text without a tokenizer, or a sample that is not one row of `min_length` tokens.
    """
    if len(samples) == 0:
        raise ValueError(f"{name} must hold at least one sequence, got none")
    encoded = []
    for i, sample in enumerate(samples):
        if isinstance(sample, str):
            if tokenizer is None:
                raise ValueError(f"{name} must be token ids where no tokenizer is given, got the text {sample[:40]!r}")
            eos = [tokenizer.eos_token_id] if append_eos and tokenizer.eos_token_id is not None else []
            sample = tokenizer(sample)["input_ids"] + eos
        ids = torch.as_tensor(sample, dtype=torch.long)
        if ids.ndim != 1 or len(ids) < min_length:
            shape = list(ids.shape)
            raise ValueError(f"{name}[{i}] must be one row of at least {min_length} tokens, got shape {shape}")
        encoded.append(ids[:max_length])
    return encoded


def right_pad(sequences: list[torch.Tensor], pad_token_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, mask), both [N, T] int64. The mask comes from lengths: a pad id inside a sequence does no harm."""
    input_ids = pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
