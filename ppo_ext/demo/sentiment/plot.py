"""demo.png, the picture of a run, and the small panels of the report page."""

import io
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
from matplotlib.ticker import MaxNLocator  # noqa: E402

from .metrics import Metrics  # noqa: E402
from .report import Row, one_line  # noqa: E402

PPO, CONTROL, BEFORE = "#1f6fb4", "#d1602c", "#666666"
COLORS = {"before": BEFORE, "ppo": PPO, "control": CONTROL}
LABELS = {"before": "before", "ppo": "after", "control": "control"}
PANELS = {
    "reward": "reward",
    "rating": "rating (PPO never sees it)",
    "kl": "KL, nats per response",
    "kl_coef": "KL coefficient",
    "entropy": "entropy, nats per token",
    "clipfrac": "clipped ratios, share of tokens",
    "var_explained": "variance of returns that the values explain",
    "length": "tokens per response",
    "distinct_2": "distinct-2 of the batch",
}
SAMPLES = 3
STYLE = {"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}


def draw_picture(path: Path, logs: dict[str, list[dict]], stages: dict, metrics: Metrics, rows: list[Row]) -> None:
    """Reward, rating and KL over the steps, and the first held-out samples before and after.

    Args:
        logs: records of metrics.jsonl per stage. Lines are means over a step's training responses.
        stages: held-out figures, drawn as points with their 95 % intervals.
    """
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12, 6.6), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.6, 1.0])
        axes = top.subplots(1, 3)
        for axis, key, title in zip(
            axes,
            ("reward", "rating", "kl"),
            (f"Reward: {metrics.reward.name}", f"Held out: {metrics.rating.name}", "KL to the model before PPO"),
        ):
            _curves(axis, key, logs, stages)
            axis.set_title(title, fontsize=11.5, loc="left", fontweight="bold")
            axis.set_xlabel("PPO step")
        axes[0].set_ylabel("training responses, mean per step")
        axes[1].set_ylabel("PPO never sees it")
        axes[2].set_ylabel("nats per response")
        _samples(bottom, rows[:SAMPLES])
        figure.savefig(path, dpi=140)
        plt.close(figure)


def draw_panels(logs: dict[str, list[dict]], stages: dict) -> str:
    """Everything that is logged per step, as one SVG element."""
    with plt.rc_context(STYLE | {"font.size": 9}):
        figure, axes = plt.subplots(3, 3, figsize=(11, 7.2), layout="constrained")
        for axis, (key, title) in zip(axes.flat, PANELS.items()):
            _curves(axis, key, logs, stages if key in ("reward", "rating", "kl") else {})
            axis.set_title(title, fontsize=10, loc="left")
        for axis in axes[-1]:
            axis.set_xlabel("PPO step")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _curves(axis, key: str, logs: dict[str, list[dict]], stages: dict) -> None:
    for stage, records in logs.items():
        axis.plot([r["step"] for r in records], [r[key] for r in records], color=COLORS[stage], lw=1.8)
    for stage, results in stages.items():
        if stage in COLORS and f"{key}_ci" in results:
            step = 0 if stage == "before" else logs[stage][-1]["step"] + 1
            value, color = results[key], COLORS[stage]
            axis.errorbar(step, value, yerr=results[f"{key}_ci"], color=color, marker="o", ms=6, capsize=4, lw=1.6)
            text = {"color": color, "fontsize": 9, "fontweight": "bold", "textcoords": "offset points"}
            if stage == "before":  # below its interval, where no curve runs
                lower = (step, value - results[f"{key}_ci"])
                axis.annotate(f"before {value:.2f}", lower, (-6, -6), ha="left", va="top", **text)
            else:  # right of all curves
                axis.annotate(f"{LABELS[stage]}\n{value:.2f}", (step, value), (8, 0), ha="left", va="center", **text)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", color="#e8e8e8", lw=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.06, y=0.15)
    if stages:  # room for the labels at the right
        left, right = axis.get_xlim()
        axis.set_xlim(left, right + 0.12 * (right - left))


def _samples(figure, rows: list[Row]) -> None:
    """One column per opening: the text before and after, with the metric that PPO never sees."""
    axes = figure.subplots(1, max(len(rows), 1), squeeze=False)[0]
    for axis, row in zip(axes, rows):
        axis.axis("off")
        axis.set_title(f"“{one_line(row[0][1]['prompt'])} …”", fontsize=10, loc="left", fontstyle="italic")
        y = 0.98
        for stage, sample in row:
            axis.text(0, y, f"{LABELS[stage]}  ({sample['rating']:+.1f})", color=COLORS[stage], fontsize=9.5,
                      fontweight="bold", va="top", transform=axis.transAxes)  # fmt: skip
            lines = textwrap.wrap(one_line(sample["response"]), 52)[:5]
            printable = "".join(c for c in "\n".join(lines) if c.isprintable() or c == "\n")
            text = printable.replace("$", r"\$")  # a pair of dollars would begin mathematics
            axis.text(0, y - 0.1, text, fontsize=9.5, va="top", transform=axis.transAxes, linespacing=1.35)
            y -= 0.1 + 0.09 * len(lines) + 0.07
