"""Numbers of all processes of a group: one collective, in the order of the ranks."""

from typing import Any

import torch

from . import check


def check_group(op: str, group: Any) -> None:
    """`group` must be None or a process group that this process belongs to."""
    kind = getattr(torch.distributed, "ProcessGroup", ())  # not there where torch is built without processes
    if group is not None and not isinstance(group, kind):
        condition = "be None or a torch.distributed.ProcessGroup with this process"
        check.fail(op, "group", condition, type(group).__name__, TypeError)


def gather(x: torch.Tensor, group: Any) -> torch.Tensor:
    """[...] of every process -> [processes, ...]: one all_gather, of the same shape and dtype everywhere.

    What is computed from the result has the same bits on all processes.
    """
    flat = x.reshape(-1)
    parts = flat.new_empty(group.size() * len(flat))
    torch.distributed.all_gather_into_tensor(parts, flat, group=group)
    return parts.reshape(group.size(), *x.shape)
