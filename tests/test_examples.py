"""The scripts in examples/ run as they are, offline, and learn; each is short enough to be read and copied."""

import ast
import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest
from conftest import require_trl

ROOT = pathlib.Path(__file__).parent.parent
ALL = sorted((ROOT / "examples").glob("*.py"))
EXAMPLES = [path for path in ALL if "MODEL_FOLDER" not in path.read_text()]  # the others: test_examples_on_a_model.py
of_each = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def imports(path):
    """{module: imported names} of the statements `from module import names` of a script."""
    tree = ast.parse(path.read_text())
    return {x.module: [name.name for name in x.names] for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}


@pytest.mark.slow
@of_each
def test_it_runs_and_the_score_rises(path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    scores = [float(score) for score in re.findall(r"score (\S+)", result.stdout)]
    assert len(scores) >= 5 and scores[-1] > scores[0] + 0.3, result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_it_is_short(path):
    assert len(path.read_text().splitlines()) <= 80


def test_the_trl_script_imports_only_what_trl_has():
    require_trl()
    ours = {module: names for module, names in imports(ROOT / "examples/trl_script.py").items() if "ppo_ext" in module}
    assert set(ours) == {"ppo_ext.trl", "ppo_ext.trl.core"}
    for module, names in ours.items():
        theirs = importlib.import_module(module.removeprefix("ppo_ext."))
        assert not [name for name in names if not hasattr(theirs, name)]
