"""Several processes in supervised training: errors of one that all raise, before the first batch."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from ..trainer.agreement import agree, all_processes, part

# what decides how many batches a process gets, and how many of them make an update
_COMMON = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("per_device_eval_batch_size", "eval_strategy", "eval_steps", "save_strategy", "save_steps", "logging_steps"),
    "dataloader_drop_last",
)


def raised_by_all(method: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a constructor: the error of one process is raised by all, naming the process."""

    @functools.wraps(method)
    def together(self: Any, *args: Any, **kwargs: Any) -> None:
        agree(all_processes(), type(self).__name__, lambda: method(self, *args, **kwargs))

    return together


@contextlib.contextmanager
def parting() -> Iterator[None]:
    """What ends the block on one process is told to the others, which see that it is missing."""
    try:
        yield
    except BaseException as error:
        if all_processes().num_processes > 1:
            part(error)
        raise


def check_together(trainer: Any, checkpoint: Any) -> None:
    """All processes train on as many examples, with the same settings, from a folder that they see; ValueError else.

    One collective of four numbers. checkpoint: the argument resume_from_checkpoint of `train`.
    """
    owner = type(trainer).__name__

    def check() -> tuple[int, int]:
        if isinstance(checkpoint, str) and not os.path.isdir(checkpoint):
            raise ValueError(f"{owner}: resume_from_checkpoint must be a folder that is there, got {checkpoint}")
        dataset = trainer.train_dataset
        settings = str([getattr(trainer.args, name, None) for name in _COMMON]).encode()
        number = int.from_bytes(hashlib.blake2b(settings, digest_size=7).digest(), "big")
        return number, len(dataset) if hasattr(dataset, "__len__") else -1

    _, facts = agree(all_processes(), f"{owner}.train", check, lambda found: found)
    settings, sizes = zip(*facts, strict=True)
    if len(set(sizes)) > 1:
        raise ValueError(f"{owner}: train_dataset must have as many examples on all processes, got {list(sizes)}")
    if len(set(settings)) > 1:
        raise ValueError(
            f"{owner}: args must be the same on all processes, got others among {', '.join(_COMMON)} on process "
            f"{next(i for i, x in enumerate(settings) if x != settings[0])} than on process 0"
        )
