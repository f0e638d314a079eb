"""curves.png: reward model score, gold metric and KL over the PPO steps, with the control as second curve."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)

PPO_COLOR, CONTROL_COLOR, SFT_COLOR = "#1f6fb4", "#d1602c", "#555555"


def plot_curves(path: Path, ppo: list[dict], control: list[dict], stages: dict[str, dict], gold_name: str) -> None:
    """Three panels over the PPO steps. Lines: means over a step's samples. Points at the end: means over held-out prompts.

    Args:
        ppo, control: the records of metrics.jsonl; control may be empty.
        stages: the held-out figures.
    """
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    panels = (
        ("rm_score", "Reward model score", "standard deviations of SFT samples", stages["before"]["rm_score"]),
        ("gold", f"Gold metric: {gold_name}", "points (PPO never sees them)", stages["before"]["gold"]),
        ("kl", "KL to the SFT model", "nats per response", 0.0),
    )
    for axis, (key, title, unit, start) in zip(axes, panels, strict=True):
        for records, color, stage, label in (
            (ppo, PPO_COLOR, "ppo", "PPO, adaptive KL penalty"),
            (control, CONTROL_COLOR, "control", "control, no KL penalty"),
        ):
            if records:
                axis.plot([r["step"] for r in records], [r[key] for r in records], color=color, lw=1.8, label=label)
                _held_out_point(axis, records[-1]["step"], stages.get(stage), key, color)
        axis.axhline(start, color=SFT_COLOR, lw=1, ls="--", label="SFT model")
        axis.plot([], [], "o", color=SFT_COLOR, ms=5, label="at the end, held-out prompts (gold: 95 % interval)")
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("PPO step")
        axis.set_ylabel(unit)
        axis.margins(x=0.1)  # room for the numbers at the end
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e6e6", lw=0.8)
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _held_out_point(axis: Any, step: int, figures: dict | None, key: str, color: str) -> None:
    if figures is not None:
        interval = figures["gold_ci"] if key == "gold" else None
        axis.errorbar(step + 1, figures[key], yerr=interval, color=color, marker="o", ms=5, capsize=3, lw=1.5)
        text = f"{figures[key]:.2f}" if key == "rm_score" else f"{figures[key]:.1f}"
        axis.annotate(text, (step + 1, figures[key]), (7, 0), textcoords="offset points", va="center", color=color)
