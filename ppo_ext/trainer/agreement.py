"""Errors that all processes raise: what is wrong on one of them, and a process that no longer answers."""

import contextlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch

from ..ops._groups import gather as all_gather
from .departure import check_not_left, first_departure, leave

Result = TypeVar("Result")

_FACTS = 2  # integers of each process that travel with its vote
# what an error is on the processes that did not have it; any other is a RuntimeError there
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, KeyError, IndexError, NotImplementedError, ImportError, OSError)
}
_KINDS["OutOfMemoryError"] = torch.OutOfMemoryError
_LOST = re.compile(r"by peer|pair closure|broken pipe|timed out|timeout", re.IGNORECASE)  # of gloo


def agree(
    accelerator: Any,
    name: str,
    action: Callable[[], Result],
    facts: Callable[[Result], Sequence[int]] = lambda _: (0, 0),
) -> tuple[Result, list[list[int]]]:
    """Runs an action on every process; an error of one of them is raised by all, in the same words, naming the process.

    No process goes on before all have ended the action. One collective of four numbers; after an error two more.

    Args:
        accelerator: an Accelerator or a PartialState.
        name: of what all processes have to call; RuntimeError on all if one of them calls something else.
        action: must not call a collective itself.
        facts: two integers of the result, which all processes get to see.

    Returns: (the action's result, the facts of each process).
    """
    if accelerator.num_processes == 1:
        result = action()
        return result, [[*facts(result)]]
    check_not_left()
    try:
        return _agree(accelerator, name, action, facts)
    except BaseException as error:
        if not isinstance(error, Exception):  # Ctrl-C
            leave(error)
        raise


def _agree(accelerator: Any, name: str, action: Callable[[], Any], facts: Callable[[Any], Sequence[int]]) -> Any:
    outcome: Any = None
    error: Exception | None = None
    vote = torch.zeros(2 + _FACTS, dtype=torch.int64, device="cpu")
    vote[0] = zlib.crc32(name.encode())
    try:
        outcome = action()
        vote[2:] = torch.tensor(facts(outcome), device="cpu")
    except Exception as caught:
        error, vote[1] = caught, 1
    names, failed, *all_facts = gather(accelerator, vote).T.tolist()
    if len(set(names)) > 1:
        _raise_other_names(accelerator, name)
    if any(failed):
        raise_first(accelerator, error)
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


def raise_first(accelerator: Any, error: Exception | None) -> NoReturn:
    """Raises the error of the first process that has one, of the nearest type that all know."""
    own = None
    if error is not None:
        own = [next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS), ""), str(error)]
    found = gather_values(accelerator, own)
    process, (kind, text) = next((i, row) for i, row in enumerate(found) if row is not None)
    raise agreed(_KINDS.get(kind, RuntimeError)(f"{text} (process {process} of {len(found)})")) from error


def _raise_other_names(accelerator: Any, name: str) -> NoReturn:
    first, *others = gather_values(accelerator, name)
    process, other = next((i, other) for i, other in enumerate(others, 1) if other != first)
    raise agreed(
        RuntimeError(
            f"ppo_ext: all processes must call the same, got {first} on process 0 and {other} on process {process}; "
            "let each make all calls, for as many batches"
        )
    )


def agreed(error: Exception) -> Exception:
    """Marks an error that the other processes raise too, or that is about one of them."""
    vars(error)["ppo_ext_agreed"] = True
    return error


def is_agreed(error: BaseException | None) -> bool:
    return error is not None and "ppo_ext_agreed" in vars(error)


def is_loss_of_a_process(error: BaseException | None) -> bool:
    """Whether an error is that of a collective in which another process no longer takes part."""
    distributed = getattr(torch.distributed, "DistError", ())
    return isinstance(error, distributed) or (isinstance(error, RuntimeError) and bool(_LOST.search(str(error))))


def raise_lost(error: BaseException) -> NoReturn:
    words = re.sub(r"^\[\S+\] ", "", f"{error}").partition("\n")[0].partition(". ")[0] or type(error).__name__
    lost = first_departure() or f"one that has ended or no longer answers ({words})"
    text = f"ppo_ext: all processes must go on, got {lost}; start all of them again from what was saved last"
    raise agreed(RuntimeError(text)) from error


def part(error: BaseException) -> None:
    """Of an error between two collectives: raises that of a lost process in words, and tells the others of its own."""
    if is_agreed(error):
        return
    if is_loss_of_a_process(error):
        raise_lost(error)
    leave(error)


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Within the block, the error of a collective that lacks a process says so."""
    try:
        yield
    except RuntimeError as error:
        if is_agreed(error) or not is_loss_of_a_process(error):
            raise
        raise_lost(error)
