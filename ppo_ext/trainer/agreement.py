"""Errors that all processes raise: what is wrong on one of them, and a process that no longer answers."""

import builtins
import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch

from ..ops._groups import gather as all_gather

Result = TypeVar("Result")

_FACTS = 2  # integers of each process that travel with its vote
# what an error is on the processes that did not have it; any other is a RuntimeError there
_KINDS = ("ValueError", "TypeError", "KeyError", "IndexError", "NotImplementedError", "ImportError", "OSError")
_LOST = re.compile(r"by peer|pair closure|broken pipe|timed out|timeout", re.IGNORECASE)  # of gloo


def agree(
    accelerator: Any,
    action: Callable[[], Result],
    facts: Callable[[Result], Sequence[int]] = lambda _: (0, 0),
) -> tuple[Result, list[list[int]]]:
    """Runs an action on every process; an error of one of them is raised by all, in the same words, naming the process.

    No process goes on before all have ended the action. One collective of three numbers; after an error two more.

    Args:
        accelerator: an Accelerator or a PartialState.
        action: must not call a collective itself.
        facts: two integers of the result, which all processes get to see.

    Returns: (the action's result, the facts of each process).
    """
    if accelerator.num_processes == 1:
        result = action()
        return result, [[*facts(result)]]
    outcome: Any = None
    error: Exception | None = None
    vote = torch.zeros(1 + _FACTS, dtype=torch.int64, device="cpu")
    try:
        outcome = action()
        vote[1:] = torch.tensor(facts(outcome), device="cpu")
    except Exception as caught:
        error, vote[0] = caught, 1
    failed, *all_facts = gather(accelerator, vote).T.tolist()
    if any(failed):
        _raise_first(accelerator, error)
    return outcome, [list(row) for row in zip(*all_facts, strict=True)]


def gather(accelerator: Any, x: torch.Tensor) -> torch.Tensor:
    """[...] of every process -> [processes, ...] on the CPU, in rank order, by one collective. x: the same shape on all."""
    with naming_lost_processes():
        return all_gather(x.detach().to(accelerator.device), torch.distributed.group.WORLD).cpu()


def gather_values(accelerator: Any, value: Any) -> list[Any]:
    """A value of every process that JSON can write, in rank order. Two collectives, for what is rare."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = gather(accelerator, torch.tensor([len(data)], device="cpu")).flatten().tolist()
    rows = gather(accelerator, torch.nn.functional.pad(data, (0, max(sizes) - len(data))))
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


def first_sentence(accelerator: Any, sentence: str | None) -> str | None:
    """The sentence of the first process that has one, with the process's number; the same on all."""
    if accelerator.num_processes == 1:
        return sentence
    found = gather_values(accelerator, sentence)
    return next((f"{text} (process {i} of {len(found)})" for i, text in enumerate(found) if text is not None), None)


class Processes(NamedTuple):
    """Those of the default process group, for `agree`, where there is no Accelerator."""

    num_processes: int
    device: torch.device


def all_processes() -> Processes:
    """The processes that are there; one, if torch.distributed is not in use."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return Processes(1, torch.device("cpu"))
    kind = "cuda" if "nccl" in str(distributed.get_backend()) else "cpu"
    return Processes(distributed.get_world_size(), torch.device(kind))


def _raise_first(accelerator: Any, error: Exception | None) -> NoReturn:
    """Raises the error of the first process that has one, of the nearest type that Python has."""
    own = None
    if error is not None:
        own = [next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS), ""), str(error)]
    found = gather_values(accelerator, own)
    process, (name, text) = next((i, row) for i, row in enumerate(found) if row is not None)
    kind = getattr(builtins, name, RuntimeError)
    raise kind(f"{text} (process {process} of {len(found)})") from error


def is_loss_of_a_process(error: BaseException | None) -> bool:
    """Whether an error is that of a collective in which another process no longer takes part."""
    distributed = getattr(torch.distributed, "DistError", ())
    return isinstance(error, distributed) or (isinstance(error, RuntimeError) and bool(_LOST.search(str(error))))


def raise_lost(error: BaseException) -> NoReturn:
    reason = re.sub(r"^\[\S+\] ", "", f"{error}").partition("\n")[0].partition(". ")[0] or type(error).__name__
    raise RuntimeError(
        f"ppo_ext: all processes must go on, got one that has ended or no longer answers ({reason}); start all of them "
        "again from what was saved last"
    ) from error


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Within the block, the error of a collective that lacks a process says so."""
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith("ppo_ext: all processes") or not is_loss_of_a_process(error):
            raise
        raise_lost(error)
