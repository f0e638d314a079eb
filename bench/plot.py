"""The plots of one machine: five bars for README, speed against each alternative, share of the memory floor, peak memory,
growth with V, N and T.

The plots of all cases have one line per case and one mark per implementation, so that a dozen peers still fit; an
implementation has the same colour and mark in each of them.
"""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend has to be chosen first)

from . import featured  # noqa: E402
from . import rows as rows_of  # noqa: E402
from .rows import is_floor, is_ours, timed  # noqa: E402
from .suite import FLOOR, OURS  # noqa: E402

_MARKS = "osD^vP*Xh<>p"
_WIDTH, _DPI = 9.0, 110  # about the width of a page on GitHub
_GROWTH = {
    "V": ("vocabulary V", "logprobs_and_entropy forward"),
    "N": ("rows N", "logprobs_and_entropy forward"),
    "T": ("tokens T of each sequence", "gae forward"),
}


def all_of(rows, folder):
    """Draws what these rows allow into `folder`; returns the names of the files."""
    styles = _styles(rows)
    drawn = [
        _save(name, draw(rows, styles), folder)
        for name, draw in (
            ("featured.png", bars),
            ("speedup.png", speedups),
            ("floor.png", floor_shares),
            ("memory.png", memory),
        )
    ]
    drawn += [_save(f"growth-{letter}.png", growth(rows, styles, letter), folder) for letter in _GROWTH]
    return [name for name in drawn if name]


def _save(name, figure, folder):
    if figure is None:
        return None
    figure.savefig(folder / name, dpi=_DPI, metadata={"Software": None})  # no version in it: same rows, same bytes
    pyplot.close(figure)
    return name


def _styles(rows):
    """Colour and mark of each implementation; ours is black."""
    names = sorted({row["implementation"] for row in rows if timed(row) and not is_ours(row) and not is_floor(row)})
    palette = pyplot.colormaps["tab10"]
    styles = {name: {"color": palette(i % 10), "marker": _MARKS[i % len(_MARKS)]} for i, name in enumerate(names)}
    return {
        OURS: {"color": "black", "marker": "o"},
        f"{OURS}, in place": {"color": "black", "marker": "s"},
        FLOOR: {"color": "tab:red", "marker": "|"},
        **styles,
    }


def _selected(rows):
    """(title, rows in the setting that is shown) of the selected cases that we have a time for."""
    for key, group in rows_of.by_case(row for row in rows if row["kind"] == "speed" and row["selected"]).items():
        if timed(rows_of.ours(group)):
            yield rows_of.title(key), [row for row in group if row["shown"] and timed(row)]


def _dots(cases, styles, xlabel, *, mark=None, log=False):
    """A figure with one line for each of `cases`, (title, {implementation: value}); None without any."""
    cases = [(title, values) for title, values in cases if values]
    if not cases:
        return None
    figure, axes = pyplot.subplots(figsize=(_WIDTH, 1.6 + 0.3 * len(cases)), layout="constrained")
    for i, (_, values) in enumerate(cases):
        for name, value in values.items():
            axes.plot(value, -i, linestyle="", markersize=6, label=name, alpha=0.85, **styles[name])
    axes.set_yticks([-i for i in range(len(cases))], [title for title, _ in cases], fontsize=8)
    axes.set_ylim(-len(cases) + 0.4, 0.6)
    axes.grid(axis="both", linewidth=0.4)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    if mark is not None:
        axes.axvline(mark, color="black", linewidth=1.0)
    axes.set_xlabel(xlabel)
    _legend(figure, axes)
    return figure


def _legend(figure, axes):
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside upper center", ncols=3, frameon=False)


def bars(rows, styles):
    """How many times longer TRL and the fastest alternative take, two bars for each of README's cases."""
    cases = list(featured.groups(rows))
    if not cases:
        return None
    figure, axes = pyplot.subplots(figsize=(_WIDTH, 0.8 + 0.75 * len(cases)), layout="constrained")
    for i, (_, group) in enumerate(cases):
        ours, trl, fastest = rows_of.ours(group), rows_of.trl(group), rows_of.fastest_other(group)
        shown = [(trl, "tab:orange"), (fastest, "tab:blue")] if fastest is not trl else [(trl, "tab:orange")]
        for j, (row, color) in enumerate((row, color) for row, color in shown if row and timed(row)):
            times, y = row["p50_ms"] / ours["p50_ms"], -i + (0.2 - 0.4 * j if len(shown) > 1 else 0.0)
            axes.barh(y, times - 1, left=1, height=0.36, color=color)
            axes.annotate(f" {times:.3g}x  {row['implementation']}", (max(times, 1.0), y), va="center", fontsize=9)
    axes.set_yticks([-i for i in range(len(cases))], [title for title, _ in cases])
    axes.set_xscale("log")
    axes.set_xlim(left=min(0.9, *axes.get_xlim()), right=12 * axes.get_xlim()[1])  # room for the names behind the bars
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("time of the alternative / time of ppo_ext (logarithmic; longer bars are slower)")
    return figure


def speedups(rows, styles):
    """How many times faster ours is than each alternative; left of the line is a loss."""
    cases = [
        (
            title,
            {
                row["implementation"]: row["p50_ms"] / rows_of.ours(group)["p50_ms"]
                for row in group
                if not is_ours(row) and not is_floor(row)
            },
        )
        for title, group in _selected(rows)
    ]
    return _dots(cases, styles, "time of the alternative / time of ppo_ext", mark=1.0, log=True)


def floor_shares(rows, styles):
    """How near each implementation comes to a read or copy of the same bytes, for the ops on logits."""
    cases = [
        (
            title,
            {
                row["implementation"]: 100 * row["share_of_floor"]
                for row in group
                if "share_of_floor" in row and not is_floor(row)
            },
        )
        for title, group in _selected(rows)
        if title.startswith(("logprobs", "full_kl", "loss_head"))
    ]
    return _dots(cases, styles, "% of the memory floor (a read or copy of the same bytes in the same run)", mark=100.0)


def memory(rows, styles):
    """Peak memory beyond the inputs, in buffers of the logits' size; a gradient of its own is one."""
    cases = [
        (
            title,
            {
                row["implementation"]: row["peak_buffers"]
                for row in group
                if "peak_buffers" in row and not is_floor(row)
            },
        )
        for title, group in _selected(rows)
    ]
    return _dots(cases, styles, "peak memory beyond the inputs, in buffers of the logits' size", mark=1.0)


def growth(rows, styles, letter):
    """Time against V, N or T on two logarithmic axes, the fitted exponent in the legend."""
    curves, exponents = rows_of.curves(rows, letter), rows_of.exponents(rows, letter)
    if not curves:
        return None
    figure, axes = pyplot.subplots(figsize=(_WIDTH, 4.8), layout="constrained")
    for name, points in curves.items():
        label = f"{name} ({letter}^{exponents[name]:.2f})" if name in exponents else name
        style = {**styles[name], "marker": ""} if name == FLOOR else styles[name]
        axes.plot(
            *zip(*points), label=label, markersize=5, linewidth=1.2, linestyle="--" if name == FLOOR else "-", **style
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({size for points in curves.values() for size, _ in points})
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8, rotation=60, ha="right", rotation_mode="anchor")
    axes.minorticks_off()
    axes.grid(linewidth=0.4)
    axes.set_xlabel(_GROWTH[letter][0])
    axes.set_ylabel(f"ms, {_GROWTH[letter][1]}")
    _legend(figure, axes)
    return figure
