"""Runs test_properties.py and counts the examples that each property was tried on: `python -m tests.property_counts`.

`--save` writes the counts to bench/evidence/properties.json and renders properties.md from them; `--save FOLDER` writes
to another folder. All other arguments are passed to pytest. PPO_EXT_FUZZ_EXAMPLES sets the number of examples for each
property and op.
"""

import argparse
import json
import pathlib
import sys

import pytest
import torch

TESTS = pathlib.Path(__file__).parent
EVIDENCE = TESTS.parent / "bench/evidence"


class Recorder:
    """A pytest plugin that keeps one row for each property, op and device."""

    def __init__(self):
        self.items, self.rows = {}, []

    def pytest_collection_modifyitems(self, items):
        self.items = {item.nodeid: item for item in items if hasattr(item.module, "EXAMPLES")}

    def pytest_runtest_logreport(self, report):
        item = self.items.get(report.nodeid)
        if item is None or report.when != "call":
            return
        key = item.originalname, item.callspec.params["op"], item.callspec.params["device"]
        self.rows.append(
            dict(zip(("property", "op", "device"), key))
            | {
                "examples": item.module.EXAMPLES[key],
                "failures": int(report.failed),
                "seconds": round(report.duration, 1),
            }
        )


def render(counts):
    """The page properties.md: a table with one line for each property."""
    stamp, rows = counts["stamp"], counts["rows"]
    lines = [
        f"{sum(row['examples'] for row in rows):,} examples, {sum(row['failures'] for row in rows)} failures; "
        f"{stamp['date']}, commit {stamp['commit']}, torch {stamp['torch']}, {stamp['device']}. Written by "
        "`python -m tests.property_counts --save`; the rows by op are in properties.json.",
        "",
        "| property | ops | examples of each op | failures | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["property"] for row in rows):
        of_property = [row for row in rows if row["property"] == name]
        examples = sorted({row["examples"] for row in of_property})
        cells = (
            name.removeprefix("test_").replace("_", " "),
            ", ".join(dict.fromkeys(row["op"] for row in of_property)),
            " to ".join(f"{count:,}" for count in dict.fromkeys((examples[0], examples[-1]))),
            str(sum(row["failures"] for row in of_property)),
            f"{sum(row['seconds'] for row in of_property):.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.property_counts", description=__doc__)
    parser.add_argument("--save", nargs="?", type=pathlib.Path, const=EVIDENCE, metavar="FOLDER")
    options, rest = parser.parse_known_args()
    recorder = Recorder()
    status = pytest.main([str(TESTS / "test_properties.py"), *rest], plugins=[recorder])
    from bench import machine  # after pytest, which has put the checkout on sys.path

    counts = {"stamp": machine.stamp(torch.device("cpu")), "rows": recorder.rows}
    print(render(counts))
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "properties.json").write_text(json.dumps(counts, indent=1) + "\n")
        (options.save / "properties.md").write_text(render(counts))
    return status


if __name__ == "__main__":
    sys.exit(main())
