"""Compares two recordings of a run, and writes the evidence."""

import json
import subprocess

import torch

from bench import machine
from bench.render import replace_block

from .environment import BASELINE, ROOT

EVIDENCE = ROOT / "bench" / "evidence"
DOCS = ROOT / "docs" / "migrating-from-trl.md"
TOLERANCE = 1e-4
_IN_ENVIRONMENT = """
import importlib.metadata as m, json
print(json.dumps({name: m.version(name) for name in ("llamafactory", "torch", "transformers", "peft", "accelerate")}))
"""


def compare(run, theirs, ours, nudged=()):
    """One row: the losses of both, their largest difference, and whether ours ended with every file and within 1e-4.
    `nudged`: the baseline once for each of the run's nudges; the nearest of all is compared."""
    distances = [largest_difference(other, ours) for other in (theirs, *nudged)]
    difference = min((x for x in distances if x is not None), default=None)
    nearest = distances.index(difference)
    theirs, nudge = (theirs, *nudged)[nearest], (0.0, *run.nudges)[nearest]
    pairs = [(a["loss"], b["loss"]) for a, b in zip(theirs["steps"], ours["steps"])]
    same_tokens = all(a.get("tokens") == b.get("tokens") for a, b in zip(theirs["steps"], ours["steps"]))
    whole = len(theirs["steps"]) == len(ours["steps"]) > 0
    ended = theirs["error"] is None and ours["error"] is None and not ours["missing"]
    return {
        "name": run.name,
        "theirs": [a for a, _ in pairs],
        "ours": [b for _, b in pairs],
        "difference": difference,
        "same_tokens": same_tokens,
        "missing_files": ours["missing"],
        "missing_files_of_trl": theirs["missing"],
        "error": ours["error"],
        "error_of_trl": theirs["error"],
        "fields_of_ppo_ext": run.ours,
        "autocast": run.autocast,
        "nudge": nudge,
        "passed": bool(whole and ended and same_tokens and difference <= TOLERANCE),
    }


def largest_difference(theirs, ours):
    """Of the losses of a step; None if there is no step."""
    return max((abs(a["loss"] - b["loss"]) for a, b in zip(theirs["steps"], ours["steps"])), default=None)


def line(row):
    found = f"losses differ by {row['difference']:.1e}" if row["difference"] is not None else "no step was made"
    words = [f"{row['name']}: {'ok' if row['passed'] else 'FAILED'}", f"{len(row['ours'])} steps", found]
    for key in ("error", "error_of_trl", "missing_files"):
        if row[key]:
            words.append(f"{key} {row[key]}")
    return ", ".join(words + ([] if row["same_tokens"] else ["other tokens were sampled"]))


def save(rows, python):
    versions = json.loads(subprocess.run([python, "-c", _IN_ENVIRONMENT], check=True, capture_output=True).stdout)
    report = {
        "stamp": machine.stamp(torch.device("cpu")),
        "versions": {**versions, "trl": BASELINE.partition("==")[2]},
        "runs": rows,
    }
    (EVIDENCE / "third_party.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (EVIDENCE / "third_party.md").write_text(markdown(report), encoding="utf-8")
    DOCS.write_text(in_docs(report, DOCS.read_text(encoding="utf-8")), encoding="utf-8")


def in_docs(report, text):
    """The page of docs/ with the table between its markers."""
    parts = [versions(report), table(report), *nudges(report)]
    return replace_block(text, "\n\n".join(parts), "third-party")


def versions(report):
    return f"Versions: {', '.join(f'{name} {version}' for name, version in report['versions'].items())}."


def table(report):
    lines = [
        "| run | steps | loss of the last step, TRL | ppo_ext | largest difference of a step | files |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["runs"]:
        if row["difference"] is None:
            lines.append(f"| {row['name']} | 0 | | | {row['error'] or row['error_of_trl']} | |")
            continue
        files = "all" if not row["missing_files"] else "missing: " + ", ".join(row["missing_files"])
        cells = [row["name"], len(row["ours"]), f"{row['theirs'][-1]:.6f}", f"{row['ours'][-1]:.6f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['difference']:.1e}", files])) + " |")
    return "\n".join(lines)


def nudges(report):
    """A sentence for each run that met a baseline with other advantages."""
    return [
        f"In half precision the last bit of a float32 number may decide between two roundings, from which training goes on "
        f"in different ways: `{row['name']}` is compared with TRL whose advantages are multiplied by "
        f"1 {'+' if row['nudge'] > 0 else '-'} {abs(row['nudge']):.1e}."
        for row in report["runs"]
        if row["nudge"]
    ]


def markdown(report):
    lines = [
        "# LLaMA-Factory on ppo_ext",
        "",
        "`make third-party` runs the PPO and the reward stage of LLaMA-Factory twice, on `trl` and, with its imports",
        "exchanged, on `ppo_ext.trl`: tiny Llama models, the same data and seeds. Each step samples from the policy that",
        "the steps before have trained, so equal tokens and losses mean equal training. Clipping is off, as TRL clips",
        "once in the trainer's life.",
        "",
        versions(report),
        "",
        table(report),
        "",
        "LLaMA-Factory runs PPO under autocast, on a CPU in bfloat16. It is on in `ppo_bf16` only, where the value head of",
        "TRL is kept in float32, as ppo_ext's is under autocast; its own would be in bfloat16.",
    ]
    lines += nudges(report)
    of_fields: dict[str, list[str]] = {}
    for row in report["runs"]:
        fields = ", ".join(f"{name}={value}" for name, value in row["fields_of_ppo_ext"].items())
        of_fields.setdefault(fields, []).append(f"`{row['name']}`")
    for fields, names in of_fields.items():
        if fields:
            lines.append(f"On ppo_ext's side `{fields}`, which gives TRL's numbers: {', '.join(names)}.")
    return "\n".join(lines) + "\n"
