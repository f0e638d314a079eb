"""The report at the end of a run: the gate, the tables and the samples."""

from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from ..display import Display
from ..folder import RunFolder

MIN_GAIN, MAX_KL, MAX_NLL_RISE, MIN_DISTINCT_2, MIN_RM_ACCURACY = 12.0, 10.0, 0.5, 0.5, 0.6
EXAMPLES = 6


class Check(NamedTuple):
    """One line of the gate."""

    text: str
    passed: bool


def gate(stages: dict[str, dict]) -> list[Check]:
    """What a full run on the built-in text has to reach."""
    before, after = stages["before"], stages["ppo"]
    gain = after["gold"] - before["gold"]
    gap = (after["gold"] - after["gold_ci"]) - (before["gold"] + before["gold_ci"])
    rise = after["ref_nll"] - before["ref_nll"]
    kl, distinct, accuracy = after["kl"], after["distinct_2"], stages["reward"]["accuracy"]
    return [
        Check(f"gold metric gains at least {MIN_GAIN:.0f} points: {gain:+.1f}", gain >= MIN_GAIN),
        Check(f"95 % intervals before and after are apart: by {gap:.1f} points", gap > 0),
        Check(f"KL to the SFT model is at most {MAX_KL:.0f} nats per response: {kl:.1f}", kl <= MAX_KL),
        Check(f"reference NLL rises by at most {MAX_NLL_RISE} nats per token: {rise:+.2f}", rise <= MAX_NLL_RISE),
        Check(f"distinct-2 is at least {MIN_DISTINCT_2}: {distinct:.2f}", distinct >= MIN_DISTINCT_2),
        Check(f"reward model accuracy is at least {MIN_RM_ACCURACY}: {accuracy:.3f}", accuracy >= MIN_RM_ACCURACY),
    ]


def table(stages: dict[str, dict], gold_name: str) -> Table:
    """Before, after and, if it ran, the control; held-out prompts."""
    names = {"before": "SFT (before)", "ppo": "PPO (after)", "control": "control, no KL"}
    shown = [name for name in names if name in stages]
    result = Table(title="Held-out prompts", title_justify="left")
    result.add_column("")
    for name in shown:
        result.add_column(names[name], justify="right")
    rows = {
        escape(gold_name): lambda s: f"{s['gold']:.1f} ± {s['gold_ci']:.1f}",
        "reward model score, sd": lambda s: f"{s['rm_score']:+.2f}",
        "KL to SFT, nats per response": lambda s: f"{s['kl']:.1f}",
        "NLL under SFT, nats per token": lambda s: f"{s['ref_nll']:.2f}",
        "distinct-2": lambda s: f"{s['distinct_2']:.2f}",
    }
    for label, text in rows.items():
        result.add_row(label, *(text(stages[name]) for name in shown))
    return result


def seconds_table(stages: dict[str, dict]) -> Table:
    result = Table(title="Stages", title_justify="left")
    result.add_column("")
    result.add_column("seconds", justify="right")
    result.add_column("CPU seconds", justify="right")
    result.add_column("result")
    texts = {
        "sft": lambda s: f"held-out loss {s['eval_loss']:.2f} nats per token",
        "pairs": lambda s: f"{100 * s['ceiling']:.0f} % of votes follow the gold metric",
        "reward": lambda s: f"held-out accuracy {100 * s['accuracy']:.1f} %",
    }
    for name, results in stages.items():
        text = texts[name](results) if name in texts else ""
        result.add_row(name, f"{results['seconds']:.0f}", f"{results['cpu_seconds']:.0f}", text)
    total, cpu = (sum(s[key] for s in stages.values()) for key in ("seconds", "cpu_seconds"))
    result.add_row("all", f"{total:.0f}", f"{cpu:.0f}", style="bold")
    return result


def write_samples(folder: RunFolder, stages: dict[str, dict], gold_name: str) -> list[list[tuple[str, dict]]]:
    """Writes samples.md; returns, for the first prompts, the rows (policy, sample)."""
    names = {"before": "SFT", "ppo": "PPO", "control": "control"}
    samples = {label: folder.read_samples(stage) for stage, label in names.items() if stage in stages}
    rows = [[(label, samples[label][i]) for label in samples] for i in range(min(EXAMPLES, len(samples["SFT"])))]
    lines = [f"# Held-out samples\n\nIn brackets: {gold_name}. All samples: `samples/`.\n"]
    for row in rows:
        lines.append(f"## {one_line(row[0][1]['prompt'])} ...\n")
        lines += [f"- **{label}** ({sample['gold']:.0f}): {one_line(sample['response'])}" for label, sample in row]
        lines.append("")
    (folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")
    return rows


def print_samples(rows: list[list[tuple[str, dict]]], display: Display, count: int = 3) -> None:
    for row in rows[:count]:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(justify="right", style="bold", min_width=9)
        grid.add_column(justify="right", min_width=4)
        grid.add_column(overflow="fold")
        grid.add_row("", "", f"[dim]{escape(one_line(row[0][1]['prompt']))} ...[/dim]")
        for label, sample in row:
            grid.add_row(label, f"{sample['gold']:.0f}", escape(one_line(sample["response"])))
        display.console.print()
        display.console.print(grid)


def print_gate(checks: list[Check], display: Display) -> None:
    for check in checks:
        mark = "[green]✓[/green]" if check.passed else "[red]✗[/red]"
        display.console.print(f"  {mark} {escape(check.text)}")


def one_line(text: str) -> str:
    return " ".join(text.split())
