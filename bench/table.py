"""Rows to tables: one block per case, ours first, every other implementation with its ratio to ours."""

from .suite import FLOOR, OURS

HEADER = ("case", "implementation", "p50 ms", "p20-p80 ms", "ours is", "of the floor", "max error", "note")


def case_key(row):
    return row["op"], row["pass"], tuple(row["shape"]), row["dtype"]


def by_case(rows):
    """Rows grouped by case, in the order in which the cases first appear."""
    groups = {}
    for row in rows:
        groups.setdefault(case_key(row), []).append(row)
    return groups


def number(value):
    """Three significant digits, without an exponent where that reads better."""
    if value is None:
        return ""
    if value >= 1e3:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def speedup(row, ours):
    """How many times faster ours is than `row`; below 1 is a loss."""
    if row.get("implementation", OURS).startswith((FLOOR, OURS)) or not ours.get("p50_ms") or not row.get("p50_ms"):
        return ""
    return f"{number(row['p50_ms'] / ours['p50_ms'])}x"


def title(key):
    op, pass_name, shape, dtype = key
    return f"{op} {pass_name} {list(shape)} {dtype}"


def cells(group):
    """The table's lines of one case as tuples of strings, in HEADER's order."""
    ours = next((row for row in group if row["implementation"] == OURS), {})
    lines = []
    for row in group:
        name = row["implementation"]
        if name.startswith(OURS) and row["backend"] != "native":
            name += " (reference fallback)"
        if "peak_buffers" in row:
            lines.append((name, f"{number(row['peak_buffers'])} buffers", "", _less(row, ours), "", "", row["note"]))
            continue
        spread = f"{number(row['p20_ms'])}-{number(row['p80_ms'])}" if row.get("p50_ms") else ""
        share = f"{100 * row['share_of_floor']:.0f} %" if "share_of_floor" in row and not name.startswith(FLOOR) else ""
        lines.append((name, number(row.get("p50_ms")), spread, speedup(row, ours), share, number(row["error"]),
                      row["note"]))
    return lines


def _less(row, ours):
    if row["implementation"].startswith(OURS) or row["peak_buffers"] is None or not ours.get("peak_buffers"):
        return ""
    return f"{number(row['peak_buffers'] / ours['peak_buffers'])}x less"


def text(rows):
    """A plain-text table of all cases."""
    lines = [HEADER[1:]]
    for key, group in by_case(rows).items():
        lines += [(title(key),), *cells(group)]
    widths = [max(len(line[i]) for line in lines if len(line) > 1) for i in range(len(HEADER) - 1)]
    return "\n".join(line[0] if len(line) == 1 else
                     "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
                     for line in lines)
