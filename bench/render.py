"""Saved rows to pages: the README's table between its markers, one page per machine with every row, and the plots.

`python -m bench.render` reads bench/results/*/*.jsonl and nothing else; no number is typed by hand, and losses stay.
"""

from . import rows as rows_of
from . import table
from .rows import RESULTS, timed
from .suite import OURS
from .table import number, percent, speedup, time

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_HEAD = ("op", "pass", "shape", "dtype", "ours")
_TAIL = ("of the floor", "TRL", "ours vs TRL", "ours vs the fastest other", "max error, ours / TRL")
_NOTHING = {
    "cpu": "No CPU has been measured yet; run `python -m bench --save`.",
    "cuda": "No GPU has been measured yet; `bench/on_gpu.sh` does it.",
}
_STATES = {
    "cpu": "A time is the median of repeated calls, so caches are warm wherever the input fits into them.",
    "cuda": 'A time is the median of calls after a flush of L2. "Device" is the replay of a CUDA graph, and "of '
    'the floor" compares graphs; everything else is what a user pays, host included.',
}
_IN_README = ("speedup.png", "memory.png")


def _markdown(header, lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


# ---- the README's block ---------------------------------------------------------------------------------------------


def _summary_line(key, group, device_type):
    """One line of the README's table: our row against TRL's and against the fastest of the others."""
    _, op, pass_name, shape, dtype = key
    ours, trl, fastest = rows_of.ours(group), rows_of.trl(group), rows_of.fastest_other(group)
    graph = rows_of.in_graph(group)
    error = " / ".join(number(row.get("error")) or "-" for row in (ours, trl))
    fallback = "" if ours["backend"] == "native" else " (reference fallback)"
    best = f"{speedup(fastest, ours)} ({fastest['implementation']})".strip() if fastest else ""
    device_only = [time(graph.get("p50_ms"))] if device_type == "cuda" else []
    share = percent((graph if timed(graph) else ours).get("share_of_floor")) or ours["note"]
    return (
        op,
        pass_name,
        "x".join(map(str, shape)),
        dtype,
        time(ours.get("p50_ms")) + fallback,
        *device_only,
        share,
        time(trl.get("p50_ms")) or trl.get("note", ""),
        speedup(trl, ours),
        best,
        error,
    )


def _goals(rows):
    """One sentence on the calls that have a goal."""
    with_goal = [
        f"{op} {pass_name} {ours} us (goal {goal})"
        for op, pass_name, _, ours, *_, goal in table.overhead_lines(rows)
        if goal
    ]
    return f"Host time of a call on next to no data: {'; '.join(with_goal)}." if with_goal else ""


def _growth(rows):
    """One sentence on how our cost grows."""
    found = [
        f"{letter}^{exponents[OURS]:.2f}" for letter in "VNT" if OURS in (exponents := rows_of.exponents(rows, letter))
    ]
    return f"Our cost grows as {', '.join(found)} (V and N: logprobs_and_entropy; T: gae)." if found else ""


def _machine_summary(rows):
    """The stamp of one machine, the table of its selected cases, what a call costs, and how costs grow."""
    chosen = {
        key: group
        for key, group in rows_of.by_case(rows).items()
        if group[0]["selected"] and key[0] == "speed" and rows_of.ours(group)
    }
    device_type = rows[0]["device_type"]
    stamp = "; ".join(
        f"{name} {', '.join(sorted({str(row[name]) for row in rows}))}"
        for name in ("device", "threads", "torch", "commit")
    )
    header = (*_HEAD, *(("device",) if device_type == "cuda" else ()), *_TAIL)
    yield f"{stamp}. {_STATES[device_type]}"
    yield _markdown(header, [_summary_line(key, group, device_type) for key, group in chosen.items()])
    yield from filter(None, (_goals(rows), _growth(rows)))


def summary(machines, plots):
    """The README's block, CPU and GPU apart; an empty half says so, and holds no estimate. `plots`: of each machine."""
    parts = []
    for device_type, title in (("cpu", "**CPU**"), ("cuda", "**GPU**")):
        of_type = {name: rows for name, rows in machines.items() if rows and rows[0]["device_type"] == device_type}
        parts.append(title if of_type else f"{title}: {_NOTHING[device_type]}")
        for name, rows in of_type.items():
            parts += _machine_summary(rows)
            parts += [f"![{plot}](bench/results/{name}/{plot})" for plot in plots[name] if plot in _IN_README]
            parts.append(f"Every row and every plot: [{name}](bench/results/{name}/README.md).")
    return "\n\n".join(parts)


# ---- a page per machine ---------------------------------------------------------------------------------------------


def machine_page(rows, plots):
    """Every implementation of every case of one machine, its peers, and its plots."""
    versions = [(who, version) for who, version in rows_of.versions(rows).items()]
    absent = [(who, ops, why) for (who, why), ops in rows_of.reasons(rows).items()]
    lines = [
        (rows_of.title(key) if i == 0 else "", *cells)
        for key, group in rows_of.by_case(rows).items()
        if key[0] != "overhead"
        for i, cells in enumerate(table.cells(group))
    ]
    overhead = list(table.overhead_lines(rows))
    parts = [
        f"# {rows[0]['device']}",
        "Written by `python -m bench.render`; how to read it stands in [bench/README.md](../../README.md).",
        *(f"![{plot}]({plot})" for plot in plots),
    ]
    parts += filter(None, (table.exponent_line(rows, letter) for letter in "VNT"))
    parts += ["## Who ran", _markdown(("implementation", "version"), versions)] if versions else []
    parts += ["## Who could not", _markdown(("implementation", "ops", "why"), absent)] if absent else []
    parts += (
        ["## Host time of a call on next to no data", _markdown(table.OVERHEAD_HEADER, overhead)] if overhead else []
    )
    parts += ["## Every case", _markdown(("case", *table.HEADER), lines)]
    return "\n\n".join(parts) + "\n"


def replace_block(text, block):
    """`text` with what stands between the markers replaced."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"render: README.md must hold the markers {BEGIN} and {END}, got none")
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def main(results=RESULTS, readme=README):
    """Writes every page and plot, and replaces the README's block."""
    from . import plot  # matplotlib is needed for nothing else

    machines = rows_of.load(results)
    plots = {name: plot.all_of(rows, results / name) for name, rows in machines.items()}
    for name, rows in machines.items():
        (results / name / "README.md").write_text(machine_page(rows, plots[name]))
    readme.write_text(replace_block(readme.read_text(), summary(machines, plots)))


if __name__ == "__main__":
    main()
