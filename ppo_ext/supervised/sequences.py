"""Texts and token ids: checked rows, padded batches, and datasets of rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ..models.limits import Limits, smallest
from ..ops import check

Sample = str | Sequence[int] | torch.Tensor
Example = dict[str, Any]


def check_row(name: str, ids: Sequence[int] | torch.Tensor, min_length: int = 1) -> torch.Tensor:
    """`ids` as an int64 tensor [T]; ValueError or TypeError unless it is one row of at least `min_length` integers."""
    try:
        row = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must be one row of token ids, got {type(ids).__name__}: {error}") from None
    owner, _, argument = name.rpartition(": ")
    check.values(owner, argument, row)
    if row.numel() and (row.is_floating_point() or row.is_complex() or row.dtype == torch.bool):
        raise TypeError(f"{name} must hold integer token ids, got {row.dtype}")
    if row.ndim != 1 or len(row) < min_length:
        raise ValueError(f"{name} must be one row of at least {min_length} tokens, got shape {list(row.shape)}")
    return row.long()


def check_readable(name: str, ids: torch.Tensor, limits: Limits, remedy: str = "cut it") -> None:
    """ValueError unless the model can read the int64 ids [T] or [B, T]; remedy: what to do with a row that is too long."""
    longest = smallest(limits.length, limits.encoder_length)
    if longest is not None and ids.shape[-1] > longest:
        raise ValueError(
            f"{name} must hold at most {longest} tokens, as many as the model reads, got {ids.shape[-1]}; {remedy}"
        )
    end = limits.vocabulary
    bad = (ids < 0) if end is None else (ids < 0) | (ids >= end)
    if bad.any():
        raise ValueError(f"{name} must hold token ids in the vocabulary [0, {end}), got {ids[bad][0].item()}")


def encode(name: str, samples: Sequence[Sample], tokenizer: Any, limits: Limits) -> list[torch.Tensor]:
    """Samples as int64 tensors [T].

    Args:
        name: what error messages call the argument, such as "reward_scores: sequences".
        limits: of the model that is to read them.
    Raises:
        ValueError: there is no sample, a text without a tokenizer, a sample that is not one row of tokens, or one that
            the model cannot read.
    """
    if len(samples) == 0:
        raise ValueError(f"{name} must hold at least one sequence, got none")
    rows = [
        check_row(f"{name}[{i}]", tokenize(f"{name}[{i}]", sample, tokenizer) if isinstance(sample, str) else sample)
        for i, sample in enumerate(samples)
    ]
    for i, row in enumerate(rows):
        check_readable(f"{name}[{i}]", row, limits)
    return rows


def tokenize(name: str, text: str, tokenizer: Any, **options: Any) -> list[int]:
    """The token ids of one text; ValueError if there is no tokenizer."""
    if tokenizer is None:
        raise ValueError(f"{name} must be token ids where no tokenizer is given, got the text {text[:40]!r}")
    return tokenizer(text, **options)["input_ids"]


def right_pad(rows: Sequence[Any], value: int = 0, width: int = 0) -> torch.Tensor:
    """Rows of different lengths as one int64 tensor [N, T], filled up with `value`; T is at least `width`."""
    width = max(width, *map(len, rows))
    padded = torch.full((len(rows), width), value, dtype=torch.long)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.as_tensor(row)
    return padded


class ConvertedDataset(Dataset):
    """A torch dataset whose examples are converted when they are read."""

    def __init__(self, name: str, dataset: Any, convert: Callable[[Example, str], Example]):
        self.name, self.dataset, self.convert = name, dataset, convert

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return self.convert(self.dataset[index], f"{self.name}[{index}]")


def convert_dataset(
    name: str, dataset: Any, convert: Callable[[Example, str], Example], num_proc: int | None = None
) -> Any:
    """The dataset with every example replaced by `convert(example, "<name>[<index>]")`.

    Args:
        dataset: a list of dicts and a `datasets.Dataset` are converted here, so that a bad example is reported before
            training starts; a torch dataset with a length, and a `datasets.IterableDataset`, while they are read.
            A dict of datasets to evaluate on is converted one by one; None stays None.
        num_proc: number of processes that convert a `datasets.Dataset`.
    Raises:
        ValueError: the dataset is empty.
        TypeError: it is none of these, or several to train on.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict) and name.endswith("train_dataset"):
        raise TypeError(
            f"{name} must be one split, such as train_dataset[{next(iter(dataset), 'train')!r}], got "
            f"{type(dataset).__name__} with {list(dataset)}"
        )
    if isinstance(dataset, dict):
        return {key: convert_dataset(f"{name}[{key!r}]", part, convert, num_proc) for key, part in dataset.items()}
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if sized and len(dataset) == 0:
        raise ValueError(f"{name} must hold at least one example, got none")
    if hasattr(dataset, "map") and hasattr(dataset, "column_names"):  # of the package datasets, which is not imported
        options = {"remove_columns": dataset.column_names} | ({"num_proc": num_proc} if sized else {})
        return dataset.map(lambda example, i: convert(example, f"{name}[{i}]"), with_indices=True, **options)
    if isinstance(dataset, Dataset) and sized:
        return ConvertedDataset(name, dataset, convert)
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        return [convert(example, f"{name}[{i}]") for i, example in enumerate(dataset)]
    raise TypeError(
        f"{name} must be a datasets.Dataset, a list of dicts or a torch dataset with a length, "
        f"got {type(dataset).__name__}"
    )
