"""Saved rows to pages: the README's table between its markers, one full table per machine, and the plots.

`python -m bench.render` reads bench/results/*/*.jsonl and nothing else; no number is typed by hand, and losses stay.
"""

import json

from . import table
from .command import RESULTS
from .suite import FLOOR, OURS
from .trl_baseline import NAME as TRL

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_COLUMNS = ("op", "pass", "shape", "dtype", "ours, ms", "of the floor", "TRL, ms", "ours vs TRL",
            "ours vs the fastest other", "max error, ours / TRL")
_ORDER = ("logprobs", "logprobs_and_entropy", "full_kl", "kl_rewards", "gae", "gae+masked_whiten", "masked_whiten",
          "ppo_loss", "loss_head", "step")


def _place(path):
    return _ORDER.index(path.stem) if path.stem in _ORDER else len(_ORDER), path.stem


def load(results):
    """Rows by machine folder, in a fixed order."""
    return {folder.name: [json.loads(line) for path in sorted(folder.glob("*.jsonl"), key=_place)
                          for line in path.read_text().splitlines()]
            for folder in sorted(path for path in results.glob("*") if path.is_dir())}


def _markdown(header, lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def _summary_line(key, group):
    """One line of the README's table: our row against TRL's and against the fastest of the others."""
    op, pass_name, shape, dtype = key
    rows = {row["implementation"]: row for row in group}
    ours, trl = rows[OURS], rows.get(TRL) or rows.get("TRL's loop", {})
    others = [row for name, row in rows.items() if not name.startswith((OURS, FLOOR)) and row.get("p50_ms")]
    fastest = min(others, key=lambda row: row["p50_ms"], default=None)
    error = " / ".join(table.number(row.get("error")) or "-" for row in (ours, trl))
    share = f"{100 * ours['share_of_floor']:.0f} %" if "share_of_floor" in ours else ours["note"]
    best = f"{table.speedup(fastest, ours)} ({fastest['implementation']})" if fastest else ""
    fallback = "" if ours["backend"] == "native" else " (reference fallback)"
    return (op, pass_name, "x".join(map(str, shape)), dtype, table.number(ours.get("p50_ms")) + fallback, share,
            table.number(trl.get("p50_ms")) or trl.get("note", ""), table.speedup(trl, ours), best, error)


def _memory_lines(groups):
    for key, group in groups:
        cells = "; ".join(f"{row['implementation']} {table.number(row['peak_buffers'])}" for row in group
                          if row["peak_buffers"] is not None)
        yield (f"Peak memory of a training minibatch's loss head above its logits, {'x'.join(map(str, key[2]))} "
               f"{key[3]}, in buffers of that size (a gradient of its own is 1): {cells}.")


def summary(machines):
    """The README's block: per machine its stamp, one table of the selected cases, and the memory figures."""
    parts = []
    for rows in machines.values():
        chosen = table.by_case(row for row in rows if row["selected"])
        if not chosen:
            continue
        timed = [(key, group) for key, group in chosen.items() if "peak_buffers" not in group[0]]
        memory = [(key, group) for key, group in chosen.items() if "peak_buffers" in group[0]]
        stamp = "; ".join(f"{name} {', '.join(sorted({str(row[name]) for row in rows}))}"
                          for name in ("device", "threads", "torch", "commit"))
        parts.append(f"{stamp}. Median over interleaved rounds; the floor is a read or copy of the same bytes in the "
                     "same run.")
        parts.append(_markdown(_COLUMNS, [_summary_line(key, group) for key, group in timed]))
        parts += _memory_lines(memory)
    return "\n\n".join(parts) if parts else "No results are saved yet; run `python -m bench --save`."


def full_table(rows):
    """Every implementation of every case of one machine."""
    lines = [(table.title(key) if i == 0 else "", *cells) for key, group in table.by_case(rows).items()
             for i, cells in enumerate(table.cells(group))]
    return f"Written by `python -m bench.render`.\n\n{_markdown(table.HEADER, lines)}\n"


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

    machines = load(results)
    for name, rows in machines.items():
        (results / name / "README.md").write_text(full_table(rows))
        plot.speedups(rows, results / name / "speedup.png")
        plot.floor_shares(rows, results / name / "floor.png")
    readme.write_text(replace_block(readme.read_text(), summary(machines)))


if __name__ == "__main__":
    main()
