"""The parts of the comparison with LLaMA-Factory that need no environment of their own; `make third-party` runs it."""

import json

import pytest
from third_party import environment, report, runs

EVIDENCE = report.EVIDENCE / "third_party"


def outcome(losses, **changes):
    steps = [{"loss": loss, "tokens": [[3, 4]]} for loss in losses]
    return {"steps": steps, "error": None, "missing": [], **changes}


@pytest.mark.parametrize(
    "ours, passed",
    [
        (outcome([0.5, 0.25]), True),
        (outcome([0.5, 0.25009]), True),
        (outcome([0.5, 0.2502]), False),
        (outcome([0.5]), False),
        (outcome([]), False),
        (outcome([0.5, 0.25], error="TypeError: no"), False),
        (outcome([0.5, 0.25], missing=["model.safetensors"]), False),
        (outcome([0.5, 0.25], steps=[{"loss": 0.5, "tokens": [[9]]}, {"loss": 0.25, "tokens": [[3, 4]]}]), False),
    ],
)
def test_what_counts_as_equal(ours, passed):
    assert report.compare(runs.RUNS[2], outcome([0.5, 0.25]), ours)["passed"] is passed


def test_one_run_of_the_baseline_must_be_met():
    run = next(run for run in runs.RUNS if run.nudges)
    nudged = [outcome([0.5, 0.26 + 0.01 * i]) for i in range(len(run.nudges))]
    for i, loss in enumerate((0.25, *(0.26 + 0.01 * i for i in range(len(run.nudges))))):
        row = report.compare(run, outcome([0.5, 0.25]), outcome([0.5, loss + 5e-5]), nudged)
        assert row["passed"] and row["nudge"] == (0.0, *run.nudges)[i] and row["difference"] == pytest.approx(5e-5)
    assert not report.compare(run, outcome([0.5, 0.25]), outcome([0.5, 0.255]), nudged)["passed"]


def test_what_is_edited_in_the_copies():
    program = "from trl import PPOTrainer\n\n    from trl.core import x\nimport trl\nfrom trlx import y\n"
    expected = program.replace("trl import P", "ppo_ext.trl import P").replace("trl.core", "ppo_ext.trl.core")
    expected = expected.replace("import trl\n", "import ppo_ext.trl\n")
    assert environment.edited(program, "train/rm/trainer.py", environment.OURS) == expected
    assert environment.edited(program, "train/rm/trainer.py", environment.TRL) == program
    assert environment.edited(program, "train/dpo/trainer.py", environment.OURS) == program
    tuner = "from .dpo import run_dpo\nfrom .ppo import run_ppo\n"
    assert environment.edited(tuner, "train/tuner.py", environment.TRL) == "from .ppo import run_ppo\n"
    with pytest.raises(AssertionError, match="version check is not where it was"):
        environment.edited(program, "train/ppo/trainer.py", environment.OURS)


def test_the_committed_runs_all_passed():
    kept = json.loads(EVIDENCE.with_suffix(".json").read_text(encoding="utf-8"))
    assert [row["name"] for row in kept["runs"]] == [run.name for run in runs.RUNS]
    assert all(row["passed"] and row["difference"] <= report.TOLERANCE for row in kept["runs"])
    assert EVIDENCE.with_suffix(".md").read_text(encoding="utf-8") == report.markdown(kept)
    page = report.DOCS.read_text(encoding="utf-8")
    assert page == report.in_docs(kept, page)
