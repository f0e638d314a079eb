"""Two plots per machine: how much faster ours is, and how near every implementation comes to the memory floor."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend has to be chosen first)

from . import table  # noqa: E402
from .suite import FLOOR, OURS  # noqa: E402


def _timed(rows):
    """(title, {implementation: row}) of the selected cases with times."""
    for key, group in table.by_case(row for row in rows if row["selected"]).items():
        timed = {row["implementation"]: row for row in group if row.get("p50_ms")}
        if OURS in timed:
            yield table.title(key), timed


def _colours(rows):
    """The same colour for an implementation in every plot of one machine."""
    names = sorted({row["implementation"] for row in rows if not row["implementation"].startswith(FLOOR)})
    return {name: pyplot.colormaps["tab20"](i) for i, name in enumerate(names)}


def _bars(labelled, colours, path, xlabel, mark, start):
    """Horizontal bars of (case, implementation, value); on a log scale where they start at `mark`."""
    if not labelled:
        return
    figure, axes = pyplot.subplots(figsize=(9, 1.3 + 0.24 * len(labelled)), layout="constrained")
    previous = None
    ticks = {}
    for position, (case, name, value) in enumerate(labelled):
        axes.barh(-position, value - start, left=start, color=colours[name], label=name)
        axes.annotate(f" {table.number(value)}", (value, -position), va="center", fontsize=7)
        if case != previous:
            ticks[-position] = case
        previous = case
    axes.set_yticks(list(ticks), ticks.values(), fontsize=7)
    axes.set_ylim(-len(labelled) + 0.5, 0.5)
    if start == mark:
        axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.axvline(mark, color="black", linewidth=0.8)
    axes.set_xlabel(xlabel)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # no version in the file: same rows, same bytes
    pyplot.close(figure)


def speedups(rows, path):
    """How many times faster ours is than each baseline; left of the line is a loss."""
    labelled = [(case, name, row["p50_ms"] / timed[OURS]["p50_ms"]) for case, timed in _timed(rows)
                for name, row in timed.items() if not name.startswith((OURS, FLOOR))]
    _bars(labelled, _colours(rows), path, "time of the baseline / time of ppo_ext", mark=1.0, start=1.0)


def floor_shares(rows, path):
    """Share of the memory floor, for the ops on logits."""
    labelled = [(case, name, 100 * row["share_of_floor"]) for case, timed in _timed(rows)
                for name, row in timed.items() if row["op"].startswith(("logprobs", "full_kl"))
                and not name.startswith(FLOOR)]
    _bars(labelled, _colours(rows), path, "% of the memory floor (a read or copy of the same bytes, same run)",
          mark=100.0, start=0.0)
