"""The end of a run on the terminal and in samples.md: tables and samples."""

from rich.markup import escape
from rich.table import Table

from ..display import Display
from ..folder import RunFolder
from .gate import Check
from .metrics import Metrics

NAMES = {"before": "before PPO", "ppo": "after PPO", "control": "control, no KL penalty"}
SHORT = {"before": "before", "ppo": "after", "control": "control"}
SAMPLES = 12  # in samples.md and on the report page; samples/ has all

Row = list[tuple[str, dict]]  # of one opening: (stage, sample) for each stage


def figures(stages: dict[str, dict], metrics: Metrics) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of held-out figures, as text."""
    shown = [stage for stage in NAMES if stage in stages]
    lines = {
        f"{metrics.rating.name} (PPO never sees it)": lambda s: f"{s['rating']:+.2f} ± {s['rating_ci']:.2f}",
        f"{metrics.reward.name} (the reward)": lambda s: f"{s['reward']:+.2f} ± {s['reward_ci']:.2f}",
        "KL to the model before, nats per response": lambda s: f"{s['kl']:.1f} ± {s['kl_ci']:.1f}",
        "NLL under the model before, nats per token": lambda s: f"{s['ref_nll']:.2f}",
        "distinct-2": lambda s: f"{s['distinct_2']:.2f}",
        "tokens per response": lambda s: f"{s['length']:.1f}",
    }
    rows = [[label, *(text(stages[stage]) for stage in shown)] for label, text in lines.items()]
    return ["held-out openings, mean ± 95 % interval", *(NAMES[stage] for stage in shown)], rows


def table(stages: dict[str, dict], metrics: Metrics) -> Table:
    head, rows = figures(stages, metrics)
    result = Table(title=head[0], title_justify="left")
    result.add_column("")
    for name in head[1:]:
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(*map(escape, row))
    return result


def seconds_table(stages: dict[str, dict]) -> Table:
    result = Table(title="Stages", title_justify="left")
    for name in ("", "seconds", "CPU seconds"):
        result.add_column(name, justify="right" if name else "left")
    for name, results in stages.items():
        result.add_row(name, f"{results['seconds']:.0f}", f"{results['cpu_seconds']:.0f}")
    total, cpu = (sum(s[key] for s in stages.values()) for key in ("seconds", "cpu_seconds"))
    result.add_row("all", f"{total:.0f}", f"{cpu:.0f}", style="bold")
    return result


def read_rows(folder: RunFolder, stages: dict[str, dict], count: int = SAMPLES) -> list[Row]:
    """The first held-out openings with each stage's sample: no choice is made."""
    samples = {stage: folder.read_samples(stage) for stage in NAMES if stage in stages}
    return [[(stage, rows[i]) for stage, rows in samples.items()] for i in range(min(count, len(samples["before"])))]


def write_samples(folder: RunFolder, rows: list[Row], metrics: Metrics) -> None:
    lines = [
        "# Held-out samples\n",
        f"The first {len(rows)} held-out openings, one sample each, not selected. In brackets: {metrics.reward.name} "
        f"(the reward) / {metrics.rating.name} (PPO never sees it). All samples: `samples/`.\n",
    ]
    for row in rows:
        lines.append(f"## {one_line(row[0][1]['prompt'])} ...\n")
        lines += [
            f"- **{SHORT[stage]}** ({s['reward']:+.2f} / {s['rating']:+.2f}): {one_line(s['response'])}"
            for stage, s in row
        ]
        lines.append("")
    (folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")


def print_samples(rows: list[Row], display: Display, count: int = 3) -> None:
    for row in rows[:count]:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", style="bold", min_width=9)
        grid.add_column(justify="right", min_width=5)
        grid.add_column(overflow="fold")
        grid.add_row("", "", f"[dim]{escape(one_line(row[0][1]['prompt']))} ...[/dim]")
        for stage, sample in row:
            grid.add_row(SHORT[stage], f"{sample['rating']:+.2f}", escape(one_line(sample["response"])))
        display.console.print()
        display.console.print(grid)


def print_gate(checks: list[Check], display: Display) -> None:
    for check in checks:
        mark = "[green]✓[/green]" if check.passed else "[red]✗[/red]"
        display.console.print(f"  {mark} {escape(check.text)}")


def one_line(text: str) -> str:
    return " ".join(text.split())
