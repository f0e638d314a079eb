"""From saved rows to pages: README's five rows, the tables of docs/performance.md, one page per machine, and the plots.

`python -m bench.render` reads bench/results/*/*.jsonl and nothing else. It replaces what stands between two markers in
README.md and docs/performance.md, so no number there is typed by hand, and cases in which we lose are shown like the rest.
"""

import re

from . import featured, table
from . import rows as rows_of
from .rows import RESULTS, timed
from .suite import OURS
from .table import number, percent, speedup, time

ROOT = RESULTS.parent.parent
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs/performance.md"
# README is also shown on package indexes, where a relative link leads nowhere. pyproject.toml has the address.
REPOSITORY = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
_HEAD = ("op", "pass", "shape", "dtype", "ours")
_TAIL = ("memory floor / ours", "TRL", "ours vs TRL", "ours vs the fastest other", "max error, ours / TRL")
_NOTHING = {
    "cpu": "No CPU has been measured yet; run `python -m bench --save`.",
    "cuda": "No GPU has been measured yet; `bench/on_gpu.sh` measures one.",
}
_STATES = {
    "cpu": "A time is the median of repeated calls, so caches are warm wherever the input fits into them.",
    "cuda": 'A time is the median of calls after a flush of L2. "Device" is the replay of a CUDA graph, and the '
    "memory floor is compared with graphs; everything else is what a user pays, host included.",
}
_CAPTIONS = {
    "speedup.png": "How many times longer each alternative takes. Left of the line it is faster than ppo_ext.",
    "floor.png": "How near each implementation comes to a plain read or copy of the same bytes, which is 100 %.",
    "memory.png": "Peak memory beyond the inputs; 1 is one buffer of the logits' size.",
    "growth-V.png": "Time over the vocabulary V. Parallel lines differ by a factor; a steeper one loses more as V grows.",
    "growth-N.png": "Time over the number of rows N. Near the left edge it is the cost of a call.",
    "growth-T.png": "Time over the number of tokens T of each sequence.",
}


def address(path, kind="blob"):
    """The absolute link to a file (kind "blob"), a folder ("tree") or an image ("raw") of the repository."""
    return f"{REPOSITORY}/{kind}/main/{path}"


def _images(plots, folder=""):
    """Each plot under its caption; README's own is left out."""
    return [f"{_CAPTIONS[plot]}\n\n![{plot}]({folder}{plot})" for plot in plots if plot in _CAPTIONS]


def _markdown(header, lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


# ---- README ---------------------------------------------------------------------------------------------------------


def _featured_line(title, group):
    """One line of README's table."""
    ours, trl, fastest = rows_of.ours(group), rows_of.trl(group), rows_of.fastest_other(group)

    def against(row):
        return f"{time(row['p50_ms'])} ({speedup(row, ours)})" if row and timed(row) else ""

    name = f", {fastest['implementation']}" if fastest else ""
    return title, "x".join(map(str, ours["shape"])), time(ours["p50_ms"]), against(trl), against(fastest) + name


def short_summary(machines, plots):
    """README's block: five rows of one machine, as a plot and as a table."""
    name = featured.machine(machines)
    if name is None:
        return "\n\n".join(_NOTHING.values())
    rows = machines[name]
    no_gpu = "" if rows[0]["device_type"] == "cuda" else f" {_NOTHING['cuda']}"
    parts = [f"Measured on {_stamp(rows)}.{no_gpu}"]
    if "featured.png" in plots[name]:
        alt = "How many times longer TRL and the fastest alternative take than ppo_ext"
        parts.append(f"![{alt}]({address(f'bench/results/{name}/featured.png', 'raw')})")
    header = ("", "input", "ppo_ext", "TRL 0.11.4", "fastest alternative")
    parts.append(_markdown(header, [_featured_line(title, group) for title, group in featured.groups(rows)]))
    return "\n\n".join(parts)


# ---- docs/performance.md --------------------------------------------------------------------------------------------


def _stamp(rows):
    """What the rows of one machine have in common, such as "AMD EPYC, 2 threads, torch 2.13.0, commit abc"."""
    values = {
        name: ", ".join(sorted({str(row[name]) for row in rows})) for name in ("device", "threads", "torch", "commit")
    }
    return "{device}, {threads} threads, torch {torch}, commit {commit}".format(**values)


def _summary_line(key, group, device_type):
    """One line of the table: our row against TRL's and against the fastest of the others."""
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
    return f"Time until a call on almost no data returns: {'; '.join(with_goal)}." if with_goal else ""


def _growth(rows):
    """One sentence on how our cost grows."""
    found = [
        f"{letter}^{exponents[OURS]:.2f}" for letter in "VNT" if OURS in (exponents := rows_of.exponents(rows, letter))
    ]
    return f"The time of ppo_ext grows as {', '.join(found)} (V and N: logprobs_and_entropy; T: gae)." if found else ""


def _machine_summary(rows):
    """The stamp of one machine, the table of its selected cases, what a call costs, and how costs grow."""
    chosen = {
        key: group
        for key, group in rows_of.by_case(rows).items()
        if group[0]["selected"] and key[0] == "speed" and rows_of.ours(group)
    }
    device_type = rows[0]["device_type"]
    header = (*_HEAD, *(("device",) if device_type == "cuda" else ()), *_TAIL)
    yield f"{_stamp(rows)}. {_STATES[device_type]}"
    yield _markdown(header, [_summary_line(key, group, device_type) for key, group in chosen.items()])
    yield from filter(None, (_goals(rows), _growth(rows)))


def summary(machines, plots):
    """The block of docs/performance.md, CPU and GPU apart. Where nothing was measured it says so: there are no estimates."""
    parts = []
    for device_type, title in (("cpu", "### CPU"), ("cuda", "### GPU")):
        of_type = {name: rows for name, rows in machines.items() if rows and rows[0]["device_type"] == device_type}
        parts += [title] if of_type else [title, _NOTHING[device_type]]
        for name, rows in of_type.items():
            parts += _machine_summary(rows)
            parts += _images(plots[name], f"../bench/results/{name}/")
            parts.append(f"Every row of this machine: [{name}](../bench/results/{name}/README.md).")
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
        *_images(plots),
    ]
    parts += filter(None, (table.exponent_line(rows, letter) for letter in "VNT"))
    parts += ["## Who ran", _markdown(("implementation", "version"), versions)] if versions else []
    parts += ["## Who could not", _markdown(("implementation", "ops", "why"), absent)] if absent else []
    parts += (
        ["## Time until a call on almost no data returns", _markdown(table.OVERHEAD_HEADER, overhead)]
        if overhead
        else []
    )
    parts += ["## Every case", _markdown(("case", *table.HEADER), lines)]
    return "\n\n".join(parts) + "\n"


def replace_block(text, block, name="bench"):
    """`text` with what stands between the two markers of that name replaced."""
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, begin, rest = text.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"render: the page must hold the markers {first} and {last}, got none")
    return f"{head}{begin}\n{block}\n{end}{tail}"


def main(results=RESULTS, readme=README, performance=PERFORMANCE):
    """Writes every page and plot, and replaces the blocks of README.md and docs/performance.md."""
    from . import plot  # matplotlib is needed for nothing else

    machines = rows_of.load(results)
    plots = {name: plot.all_of(rows, results / name) for name, rows in machines.items()}
    for name, rows in machines.items():
        (results / name / "README.md").write_text(machine_page(rows, plots[name]))
    for page, block in ((readme, short_summary), (performance, summary)):
        page.write_text(replace_block(page.read_text(), block(machines, plots)))


if __name__ == "__main__":
    main()
