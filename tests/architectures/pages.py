"""The kept table of architectures and the page made of it, bench/evidence/architectures.json and docs/architectures.md."""

import json
import pathlib

from .checks import CHECKS

ROOT = pathlib.Path(__file__).parent.parent.parent
TABLE, PAGE = ROOT / "bench" / "evidence" / "architectures.json", ROOT / "docs" / "architectures.md"


def _table(header, lines):
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]


def _cell(text):
    return " ".join(text.split()).replace("|", "/").replace("<", "&lt;")


REFUSED = "ValueError: PPOTrainer: model must"


def passed(row):
    return bool(row["checks"]) and all(found == "ok" for found in row["checks"].values())


def refused(row):
    """Whether the trainer takes no such model, and says why."""
    return any(found.startswith(REFUSED) for found in row["checks"].values())


def _outcome(found):
    return "ok" if found == "ok" else "refused" if found.startswith(REFUSED) else "**no**"


def _failures(row):
    """The checks of each thing that happened."""
    checks = {}
    for name, found in row["checks"].items():
        if found != "ok":
            checks.setdefault(found, []).append(name)
    return [(row["model_type"], row["kind"], ", ".join(names), _cell(found)) for found, names in checks.items()]


def markdown(report):
    """The page of these rows."""
    rows, stamp = report["rows"], report["stamp"]
    built = [row for row in rows if row["class"]]
    lines = [
        "# Architectures",
        "",
        f"Every model type of transformers {report['transformers']} with a language model head, causal or seq2seq, in tiny "
        f"and random: {len(rows)} of them. {len(built)} could be built; {sum(map(passed, built))} of these pass every "
        f"check, and {sum(map(refused, built))} are refused with the reason. Written by `make architectures`, "
        f"{stamp['date'][:10]}, commit {stamp['commit']}, torch {stamp['torch']}.",
        "",
        "| check | what must hold |",
        "| --- | --- |",
        "| right pads, left pads | a padded batch has each sample's own results, in float64 (float32 where that is NaN) |",
        "| step | the first step's KL is 0, and every trainable weight moves that autograd reaches |",
        "| generation | greedy responses to a batch are those to each query alone |",
        "| save | a saved and reloaded model has the same weights, bit for bit, and the same outputs |",
        "| lora | with LoRA the first step's KL is 0, and adapters and value head move, nothing else |",
        "| checkpointing | a step with gradient checkpointing is the step without |",
        "| shared layers | with `num_shared_layers` the shared weights stay and the others move |",
        "| bf16 | a step in bfloat16 has a KL of 0 and a finite loss |",
        "",
        "## Pass or fail",
        "",
        *_table(
            ("model type", "kind", *CHECKS),
            [
                (
                    row["model_type"],
                    row["kind"],
                    *(_outcome(row["checks"][name]) for name in CHECKS),
                )
                for row in built
            ],
        ),
        "",
        "## What fails or is refused, and why",
        "",
        *_table(
            ("model type", "kind", "checks", "what happened"),
            [failure for row in built for failure in _failures(row)],
        ),
        "",
        "## What could not be built",
        "",
        "From sizes alone: a configuration that wants more, or a model that is no text model. That says nothing about the "
        "architecture in the trainer.",
        "",
        *_table(
            ("model type", "kind", "why"),
            [(row["model_type"], row["kind"], _cell(row["reason"])) for row in rows if not row["class"]],
        ),
    ]
    return "\n".join(lines) + "\n"


def save(report):
    lines = ",\n".join(json.dumps(row) for row in report["rows"])
    head = json.dumps({key: value for key, value in report.items() if key != "rows"})
    TABLE.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')
    PAGE.write_text(markdown(report))


def load():
    return json.loads(TABLE.read_text())


def merged(report):
    """The report with the kept rows of the architectures that it lacks, if they are of the same transformers."""
    kept = load() if TABLE.exists() else {"transformers": None}
    rows = {(row["kind"], row["model_type"]): row for row in report["rows"]}
    if kept["transformers"] == report["transformers"]:
        rows = {(row["kind"], row["model_type"]): row for row in kept["rows"]} | rows
    return report | {"rows": [rows[key] for key in sorted(rows)]}
