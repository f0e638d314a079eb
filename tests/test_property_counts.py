"""The counts of examples that are written are those of the run."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_counts_are_those_of_the_run(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PPO_EXT_TEST_DEVICE"}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.property_counts",
            "--save",
            str(tmp_path),
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "test_holes_are_tokens_deleted and cpu",
        ],
        cwd=ROOT,
        env=env | {"PPO_EXT_FUZZ_EXAMPLES": "30"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    counts = json.loads((tmp_path / "properties.json").read_text())
    (row,) = counts["rows"]
    assert (row["property"], row["op"], row["failures"]) == ("test_holes_are_tokens_deleted", "gae", 0)
    assert 30 <= row["examples"] < 60 and counts["stamp"]["commit"] and counts["stamp"]["date"]
    table = (tmp_path / "properties.md").read_text()
    assert f"| holes are tokens deleted | gae | {row['examples']} | 0 |" in table and table in result.stdout
