"""Keeps finished runs of the main demo in bench/demo/: python -m bench.demo_runs FOLDER [FOLDER ...], seed 0 first.

The picture, the samples and the figures come from the first folder; seeds.md is a table of all of them.
"""

import json
import shutil
import sys
from pathlib import Path

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
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
