"""`python -m tests.mutants [--save] [NAME ...]`: makes every mutant, runs its tests, and prints the first that fails; then
runs these without a change."""

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
                'Without the change these tests pass. "CUDA on the host" are the .cu files, run without a GPU.',
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
    rows = {row["name"]: row for row in json.loads((EVIDENCE / "mutants.json").read_text())["mutants"]}
    outcomes = []
    for mutant in tqdm.tqdm(chosen, unit="mutant"):
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(check.check(mutant, pathlib.Path(folder)))
        rows[mutant.name] = dataclasses.asdict(outcomes[-1])
        if options.save:
            save(rows)
    check_without(chosen, outcomes)
    print(markdown(report_of({outcome.name: dataclasses.asdict(outcome) for outcome in outcomes})))
    return 1 if any(outcome.killed_by is None for outcome in outcomes) else 0


def check_without(mutants, outcomes):
    """Ends the program if a test that noticed a change fails without one as well."""
    for side in tqdm.tqdm(dict.fromkeys(mutant.side for mutant in mutants), unit="run", desc="without a change"):
        pairs = [pair for pair in zip(mutants, outcomes, strict=True) if pair[0].side == side]
        with tempfile.TemporaryDirectory() as folder:
            failed = check.failure_without(*zip(*pairs, strict=True), pathlib.Path(folder))
        if failed:
            sys.exit(f"mutants: the tests that notice a change must pass without one, got a failure of {failed}")


def report_of(rows):
    return {
        "stamp": machine.stamp(torch.device("cpu")),
        "mutants": [rows[mutant.name] for mutant in MUTANTS if mutant.name in rows],
    }


def save(rows):
    report = report_of(rows)
    (EVIDENCE / "mutants.json").write_text(json.dumps(report, indent=1) + "\n")
    (EVIDENCE / "mutants.md").write_text(markdown(report))


if __name__ == "__main__":
    sys.exit(main())
