"""A process that has left a step in which the others still are: it tells them why, and takes part in nothing more.

An error that the processes cannot agree on, or Ctrl-C, ends a step on one of them between two collectives. The next ones
of the others would be paired with whatever that process does next, so it refuses. The others learn the reason from the
key-value store by which the processes have found each other, as soon as their collective fails.
"""

import contextlib
import weakref
from typing import Any

import torch

_departed: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()  # why, by the store of the processes


def leave(error: BaseException) -> None:
    """This process has left a step, or another method that all call, by an error. No collective."""
    store = _store()
    if store is None or store in _departed:
        return
    _departed[store] = reason = f"{type(error).__name__}: {error}".removesuffix(": ")
    with contextlib.suppress(RuntimeError):  # its server is gone
        store.set(_key(torch.distributed.get_rank()), reason)


def check_not_left() -> None:
    """RuntimeError if this process has left the others before."""
    store = _store()
    if store is not None and store in _departed:
        raise RuntimeError(
            "ppo_ext: this process must not go on, since it has left a step in which the others were, by "
            f"{_departed[store]}; start all of them again from what was saved last"
        )


def first_departure() -> str | None:
    """The first process that has left, and why; None if none has, or if it cannot be known."""
    store = _store()
    if store is None:
        return None
    with contextlib.suppress(RuntimeError):
        for process in range(torch.distributed.get_world_size()):
            if store.check([_key(process)]):
                return f"process {process}, which has left by {store.get(_key(process)).decode()}"
    return None


def _key(process: int) -> str:
    return f"ppo_ext/departed/{process}"


def _store() -> Any:
    """None without several processes, and where torch does not tell."""
    with contextlib.suppress(AttributeError, ValueError, RuntimeError):
        return torch.distributed.distributed_c10d._get_default_store()
    return None
