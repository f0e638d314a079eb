"""Rows to tables: one block per case, ours first, every other implementation with its ratio to ours."""

from . import rows as rows_of
from .bench_overhead import OPERATOR, TARGET_US
from .rows import is_floor, is_ours, timed, wrong

HEADER = ("implementation", "time", "p20-p80", "ours is", "floor / time", "other state", "peak", "max error", "note")


def number(value):
    """Three significant digits, with an exponent only for small numbers."""
    if value is None:
        return ""
    if value >= 1e3:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def time(ms):
    """Milliseconds, or microseconds if shorter than 0.1 ms."""
    if ms is None:
        return ""
    return f"{number(ms)} ms" if ms >= 0.1 else f"{number(1e3 * ms)} us"


def percent(share):
    return "" if share is None else f"{100 * share:.0f} %"


def speedup(row, ours):
    """How many times faster ours is than `row`; below 1 ours is slower."""
    if not timed(ours) or not timed(row) or is_floor(row) or is_ours(row):
        return ""
    return f"{number(row['p50_ms'] / ours['p50_ms'])}x"


def cells(group):
    """The lines of one case as tuples of strings, in the order of HEADER. `reasons` lists the implementations that
    could not run."""
    ours = rows_of.ours(group)
    lines = []
    for row in group:
        if not row["shown"] or not (timed(row) or wrong(row)):
            continue
        name = row["implementation"] + (" (reference fallback)" if is_ours(row) and row["backend"] != "native" else "")
        spread = f"{time(row['p20_ms'])} - {time(row['p80_ms'])}" if timed(row) else ""
        share = "" if is_floor(row) else percent(row.get("share_of_floor"))
        peak = f"{number(row['peak_buffers'])} buffers" if "peak_buffers" in row else ""
        lines.append(
            (
                name,
                time(row.get("p50_ms")),
                spread,
                speedup(row, ours),
                share,
                _other_states(row, group),
                peak,
                number(row["error"]),
                row["note"],
            )
        )
    return lines


def _other_states(row, group):
    """The times of the same implementation in the settings that the time column does not show."""
    return "; ".join(
        f"{other['cache'] if other['mode'] == 'eager' else other['mode']} {time(other['p50_ms'])}"
        for other in group
        if not other["shown"] and timed(other) and other["implementation"] == row["implementation"]
    )


OVERHEAD_HEADER = ("op", "pass", "shape", "ours, us", "torch operator, us", "TRL, us", "goal, us")


def overhead_lines(rows):
    """The tuples of strings for OVERHEAD_HEADER, in microseconds."""
    for key, group in rows_of.by_case(row for row in rows if row["kind"] == "overhead").items():
        ours, target = rows_of.ours(group), TARGET_US.get(key[1:3])
        operator = next((row for row in group if row["implementation"] == OPERATOR), {})
        met = "" if target is None or not timed(ours) else "met" if 1e3 * ours["p50_ms"] <= target else "missed"
        yield (
            key[1],
            key[2],
            "x".join(map(str, key[3])),
            *(number(1e3 * row["p50_ms"]) if timed(row) else "" for row in (ours, operator, rows_of.trl(group))),
            f"{target:.0f}, {met}" if target else "",
        )


def exponent_line(rows, letter):
    """One sentence on how the cost grows with V, N or T, "" without a sweep."""
    found = "; ".join(f"{name} {value:.2f}" for name, value in rows_of.exponents(rows, letter).items())
    return f"Cost grows with {letter} to the power of: {found}." if found else ""


def text(rows):
    """A plain-text table of all cases, the overhead of calls, how costs grow, and who could not run."""
    lines = [HEADER]
    speed = [row for row in rows if row["kind"] != "overhead"]
    for key, group in rows_of.by_case(speed).items():
        lines += [(rows_of.title(key),), *cells(group)]
    parts = [_columns(lines)] if speed else []
    overhead = list(overhead_lines(rows))
    if overhead:
        parts.append(_columns([("host time of a call with next to no data",), OVERHEAD_HEADER, *overhead]))
    parts += filter(None, (exponent_line(rows, letter) for letter in "VNT"))
    versions = [f"{who} {version}" for who, version in rows_of.versions(rows).items()]
    parts += [f"versions: {'; '.join(versions)}"] if versions else []
    parts += [f"not timed: {who} ({ops}): {why}" for (who, why), ops in rows_of.reasons(rows).items()]
    return "\n".join(parts)


def _columns(lines):
    widths = [max(len(line[i]) for line in lines if len(line) > 1) for i in range(max(map(len, lines)))]
    return "\n".join(
        line[0] if len(line) == 1 else "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        for line in lines
    )
