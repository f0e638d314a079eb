"""`python -m tests.mutants [--save] [NAME ...]`: makes every mutant, runs its tests, and prints the first that
fails."""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile

import torch
import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from bench import machine  # noqa: E402

from . import check  # noqa: E402
from .table import MUTANTS  # noqa: E402

EVIDENCE = pathlib.Path(__file__).parent.parent.parent / "bench" / "evidence"


def run(mutant, mutate=True):
    with tempfile.TemporaryDirectory() as folder:
        return check.check(mutant, pathlib.Path(folder), mutate)


def markdown(report):
    stamp, rows = report["stamp"], report["mutants"]
    lines = [
        f"| {row['name']} | {row['side']} | {row['file']} | "
        f"{'`' + row['killed_by'] + '`' if row['killed_by'] else '**survived**'} |"
        for row in rows
    ]
    killed = sum(bool(row["killed_by"]) for row in rows)
    return (
        "\n".join(
            [
                "# Mutants",
                "",
                f"{killed} of {len(rows)} wrong changes are seen by the tests; {stamp['date']}, "
                f"commit {stamp['commit']}. Written by `python -m tests.mutants --save` (`make mutants`). "
                'Without the change the same tests pass. "CUDA on the host" are the .cu files, run without a GPU.',
                "",
                "| change | side | file | first test that fails |",
                "| --- | --- | --- | --- |",
                *lines,
            ]
        )
        + "\n"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of the name of those to make; default: all")
    parser.add_argument(
        "--save", action="store_true", help="keep the outcome in bench/evidence/mutants.json and mutants.md"
    )
    options = parser.parse_args(argv)
    chosen = [mutant for mutant in MUTANTS if not options.names or any(name in mutant.name for name in options.names)]
    for mutant in tqdm.tqdm(check.baselines(chosen), unit="run", desc="without a mutant"):
        failed = run(mutant, mutate=False).killed_by
        if failed:
            sys.exit(f"mutants: {mutant.tests} must pass without a mutant, got a failure of {failed}")
    outcomes = [run(mutant) for mutant in tqdm.tqdm(chosen, unit="mutant")]
    rows = {outcome.name: dataclasses.asdict(outcome) for outcome in outcomes}
    if options.names and options.save:  # the outcomes of all others are kept
        kept = json.loads((EVIDENCE / "mutants.json").read_text())["mutants"]
        rows = {row["name"]: row for row in kept} | rows
    report = {
        "stamp": machine.stamp(torch.device("cpu")),
        "mutants": [rows[mutant.name] for mutant in MUTANTS if mutant.name in rows],
    }
    print(markdown(report))
    if options.save:
        (EVIDENCE / "mutants.json").write_text(json.dumps(report, indent=1) + "\n")
        (EVIDENCE / "mutants.md").write_text(markdown(report))
    return 1 if any(outcome.killed_by is None for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
