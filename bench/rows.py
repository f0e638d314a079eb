"""The raw rows: where they are kept, which of them belong together, and queries on them."""

import json
import pathlib
import re

from tests.ops import OPS

from . import fit
from .suite import FLOOR, OURS, PRODUCTS

RESULTS = pathlib.Path(__file__).parent / "results"
_BEFORE = {
    "kind": "speed",
    "shown": True,
    "device_type": "cpu",
    "mode": "eager",
    "version": "",
}  # fields that the oldest rows lack
_ORDER = (*OPS, "loss_head", "step", "overhead", "sweep")


def folder_of(row):
    """The name of a machine's folder: its device and, on a CPU, the number of threads."""
    name = row["device"] if row["device_type"] == "cuda" else f"{row['device']} {row['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def case_key(row):
    return row["kind"], row["op"], row["pass"], tuple(row["shape"]), row["dtype"]


def title(key):
    kind, op, pass_name, shape, dtype = key
    return f"{'' if kind == 'speed' else kind + ': '}{op} {pass_name} {list(shape)} {dtype}"


def by_case(rows):
    """Rows grouped by case, in the order in which the cases first appear."""
    groups = {}
    for row in rows:
        groups.setdefault(case_key(row), []).append(row)
    return groups


def save(rows, results=RESULTS):
    """Writes one file for each op or kind of measurement. Rows of the cases that were measured again are replaced."""
    for stem in sorted({_stem(row) for row in rows}):
        new = [row for row in rows if _stem(row) == stem]
        path = results / folder_of(new[0]) / f"{stem}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        measured = {case_key(row) for row in new}
        kept = [row for row in _read(path) if case_key(row) not in measured] if path.exists() else []
        whole = path.with_suffix(".new")  # a run that is stopped here leaves either the old file or the new one
        whole.write_text("".join(json.dumps(row) + "\n" for row in kept + new))
        whole.replace(path)


def load(results=RESULTS):
    """Rows by machine folder, in a fixed order."""
    return {
        folder.name: [row for path in sorted(folder.glob("*.jsonl"), key=_place) for row in _read(path)]
        for folder in sorted(path for path in results.glob("*") if path.is_dir())
    }


def _stem(row):
    return row["op"] if row["kind"] == "speed" else row["kind"].split()[0]


def _read(path):
    return [_BEFORE | json.loads(line) for line in path.read_text().splitlines()]


def _place(path):
    first = path.stem.partition("+")[0]  # a chain of ops comes after its first op
    return _ORDER.index(first) if first in _ORDER else len(_ORDER), path.stem


# ---- what is asked of rows ------------------------------------------------------------------------------------------


def timed(row):
    return bool(row.get("p50_ms"))


def wrong(row):
    return row["note"].startswith("WRONG")


def is_ours(row):
    return row["implementation"].startswith(OURS)


def is_floor(row):
    return row["implementation"].startswith((FLOOR, PRODUCTS))


def ours(group):
    """Our row of a case in the setting that tables show; {} if there is none."""
    return next((row for row in group if row["implementation"] == OURS and row["shown"]), {})


def others(group):
    """The timed rows of all other implementations in the setting that tables show."""
    return [row for row in group if row["shown"] and timed(row) and not is_ours(row) and not is_floor(row)]


def fastest_other(group):
    return min(others(group), key=lambda row: row["p50_ms"], default=None)


def trl(group):
    """The row of the oldest TRL, which runs eagerly as its users run it; {} if there is none."""
    return next((row for row in group if row["shown"] and row["implementation"].startswith("TRL")), {})


def in_graph(group, implementation=OURS):
    """The row of the same implementation replayed from a CUDA graph; {} if there is none."""
    return next((row for row in group if row["implementation"] == implementation and row["mode"] == "graph"), {})


def reasons(rows):
    """{(implementation, why it was not timed): the ops} of the implementations that could not run."""
    found = {}
    for row in rows:
        if row["note"] and not timed(row) and not wrong(row):
            found.setdefault((row["implementation"], row["note"]), {})[row["op"]] = True
    return {key: ", ".join(ops) for key, ops in found.items()}


def versions(rows):
    """{implementation: version} of those that ran and have a version of their own."""
    return {row["implementation"]: row["version"] for row in rows if row["version"] and timed(row)}


def curves(rows, letter):
    """{implementation: [(size, ms), ...]} of the sweep over V, N or T; times of CUDA graphs where there are any."""
    position = {"V": 1, "N": 0, "T": 1}[letter]
    points = {}
    for row in rows:
        if row["kind"] == f"sweep {letter}" and timed(row):
            of = points.setdefault(row["implementation"], {})
            if row["shown"] and row["shape"][position] in of:
                continue
            of[row["shape"][position]] = row["p50_ms"]
    return {name: sorted(of.items()) for name, of in points.items()}


def exponents(rows, letter):
    """{implementation: the exponent of its cost} of a sweep."""
    return {name: fit.exponent(*zip(*points)) for name, points in curves(rows, letter).items() if len(points) > 2}
