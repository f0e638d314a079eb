"""The five cases that README shows: ours against TRL's classic trainer and against the fastest alternative of all."""

from . import rows as rows_of
from .rows import timed

# (op, pass): from one op of the loss path to the whole training step of GPT-2 small, most of which is the model itself
CASES = (
    ("logprobs", "forward+backward"),
    ("logprobs_and_entropy", "forward+backward"),
    ("gae", "forward"),
    ("ppo_loss", "forward+backward"),
    ("step", "PPOTrainer.step, GPT-2 small"),
)


def groups(rows):
    """(title, rows of the case) for each of CASES that was measured: the first shape and dtype in the selection."""
    by_case = rows_of.by_case(row for row in rows if row["kind"] == "speed" and row["selected"])
    for op, pass_name in CASES:
        of_op = (group for key, group in by_case.items() if key[1:3] == (op, pass_name) and timed(rows_of.ours(group)))
        group = next(of_op, None)
        if group is not None:
            yield title(op, pass_name), group


def title(op, pass_name):
    return pass_name if op == "step" else f"{op}, {pass_name}"


def machine(machines):
    """The name of the machine that README shows: a GPU if one was measured, of several the last; None without any."""
    measured = {
        name: (rows[0]["device_type"] == "cuda", max(row["date"] for row in rows))
        for name, rows in machines.items()
        if rows
    }
    return max(measured, key=measured.get, default=None)
