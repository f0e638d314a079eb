"""Keeps finished runs of the main demo in bench/demo/: python -m bench.demo_runs FOLDER [FOLDER ...], seed 0 first.

The picture, the samples and the figures come from the first folder; seeds.md is a table of all of them. README shows the
picture and a paragraph with the figures.
"""

import json
import shutil
import sys
from pathlib import Path

from .render import README, REPOSITORY, replace_block

TARGET = Path(__file__).parent / "demo"
KEPT = ("demo.png", "samples.md", "summary.json")
COLUMNS = (
    "seed", "rating before", "rating after", "reward before", "reward after", "KL", "distinct-2", "NLL", "min", "CPU min",
    "gate",
)  # fmt: skip


def row(summary: dict) -> list[str]:
    """One line of seeds.md."""
    before, after = summary["stages"]["before"], summary["stages"]["ppo"]

    def mean(figures, key):
        return f"{figures[key]:+.2f} ± {figures[f'{key}_ci']:.2f}"

    def both(key):
        return f"{before[key]:.2f} → {after[key]:.2f}"

    minutes = [sum(s[key] for s in summary["stages"].values()) / 60 for key in ("seconds", "cpu_seconds")]
    return [
        str(summary["arguments"]["seed"]), mean(before, "rating"), mean(after, "rating"), mean(before, "reward"),
        mean(after, "reward"), f"{after['kl']:.1f}", both("distinct_2"), both("ref_nll"), *(f"{m:.1f}" for m in minutes),
        "passed" if summary["passed"] else "failed",
    ]  # fmt: skip


def table(summaries: list[dict]) -> str:
    """seeds.md: what the columns mean, and a line per run."""
    first = summaries[0]
    agreement = first["correlation"]
    lines = [
        "# The main demo on several seeds\n",
        f"Held-out openings, mean ± 95 % interval. Rating: {first['rating']}, which PPO never sees (correlation with "
        f"people's ratings {agreement[first['rating']]:.2f}). Reward: {first['reward']} "
        f"({agreement[first['reward']]:.2f}). KL in nats per response; NLL under the model before PPO, in nats per token.\n",
        " | ".join(["", *COLUMNS, ""]).strip(),
        "|" + "---|" * len(COLUMNS),
        *(" | ".join(["", *row(summary), ""]).strip() for summary in summaries),
    ]
    return "\n".join(lines) + "\n"


def paragraph(summary: dict) -> str:
    """README's picture of the demo, and what is seen in it."""
    before, after = summary["stages"]["before"], summary["stages"]["ppo"]
    minutes = sum(stage["seconds"] for stage in summary["stages"].values()) / 60
    seeds, page = (f"{REPOSITORY}/blob/main/{path}" for path in ("bench/demo/seeds.md", "docs/demo.md"))
    rating = " and ".join(
        f"{stage['rating']:+.2f} ± {stage['rating_ci']:.2f} {when}"
        for stage, when in ((before, "before"), (after, "after"))
    )
    return (
        f"![Reward, held-out rating and KL over the steps, and samples]({REPOSITORY}/raw/main/bench/demo/demo.png)\n\n"
        f"`make demo`: PPO on SmolLM2-135M-Instruct, {minutes:.0f} minutes on two CPU cores. The reward is a lexicon's "
        f"sentiment; what judges is\na model of people's ratings that PPO never sees: {rating}, at a KL of "
        f"{after['kl']:.1f} nats per response. The samples\nare the first ones, not the best. "
        f"[Three seeds]({seeds}), [more about the demo]({page})."
    )


def main(folders: list[str]) -> int:
    """Copies and writes the files; refuses runs with other settings than the default ones."""
    if not folders:
        print(__doc__, file=sys.stderr)
        return 2
    summaries = [json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    for folder, summary in zip(folders, summaries, strict=True):
        if summary["passed"] is None:
            print(f"demo_runs: {folder} must be a full run of the main demo, got one without a gate", file=sys.stderr)
            return 2
    TARGET.mkdir(exist_ok=True)
    for name in KEPT:
        shutil.copy(Path(folders[0]) / name, TARGET / name)
    (TARGET / "seeds.md").write_text(table(summaries), encoding="utf-8")
    README.write_text(replace_block(README.read_text(), paragraph(summaries[0]), "demo"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
