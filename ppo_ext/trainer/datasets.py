"""The dataset of a trainer: what kinds there are, and batches of its samples."""

from collections.abc import Callable
from typing import Any

import torch


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be read in its own order: an IterableDataset of torch or of the package datasets."""
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return isinstance(dataset, torch.utils.data.IterableDataset) or (hasattr(dataset, "column_names") and not indexed)


def check_dataset(dataset: Any) -> None:
    """TypeError for what is no dataset, or several."""
    if isinstance(dataset, dict):  # a DatasetDict is one
        raise TypeError(
            f"PPOTrainer: dataset must be one split, such as dataset[{next(iter(dataset), 'train')!r}], got "
            f"{type(dataset).__name__} with {list(dataset)}"
        )
    # a datasets.Dataset does not inherit from torch's Dataset, but is indexed like one
    if not isinstance(dataset, torch.utils.data.Dataset) and not hasattr(dataset, "column_names"):
        raise TypeError(f"PPOTrainer: dataset must be a torch or datasets Dataset, got {type(dataset).__name__}")


def batches(
    dataset: Any, batch_size: int, processes: int, collate: Callable[[list[Any]], Any] | None, ragged: bool = False
) -> torch.utils.data.DataLoader[Any]:
    """A dataloader of whole batches, with `ragged` also of a last smaller one: shuffled, or for a stream in its own order.

    Raises: ValueError for fewer samples than one batch for every process, with `ragged` than one sample for each.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "collate_fn": collate, "drop_last": not ragged}
    if is_stream(dataset):
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            dataset = _Stream(dataset)
        return torch.utils.data.DataLoader(dataset, **options)
    if ragged and len(dataset) < processes:
        got = f"{len(dataset)} for {processes} processes"
        raise ValueError(f"PPOTrainer: dataset must hold at least one sample for each process, got {got}")
    if not ragged and len(dataset) < batch_size * processes:
        raise ValueError(
            f"PPOTrainer: dataset must hold at least config.batch_size * processes = {batch_size} * {processes} samples, "
            f"one whole batch each, got {len(dataset)}"
        )
    return torch.utils.data.DataLoader(dataset, shuffle=True, **options)


class _Stream(torch.utils.data.IterableDataset[Any]):
    """A datasets.IterableDataset as one of torch, which a dataloader does not index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        return iter(self.dataset)
