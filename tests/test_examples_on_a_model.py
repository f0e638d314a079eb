"""The scripts in examples/ that take a model's folder run as they are on a tiny one; so does the notebook."""

import contextlib
import io
import json
import pathlib
import re
import runpy
import sys
import types

import pytest

from ppo_ext.demo.sentiment import tiny

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_model(
        folder, ["The city on the river", "good or bad, the report says that it is", "a be ci do"] * 3, seed=0
    )
    return str(folder)


@pytest.fixture
def run(model_folder, monkeypatch, capsys):
    """Runs a script as the command line would, in this process, and returns what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, model_folder, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def scores(printed):
    return [float(score) for score in re.findall(r'score"?:? +(\S+?)[,\s]', printed)]


def test_sentiment(run, monkeypatch):
    class Analyzer:  # in the place of VADER, which a test environment need not have
        def polarity_scores(self, text):
            return {"compound": min(text.count("e") / 10, 1.0)}

    package, module = types.ModuleType("vaderSentiment"), types.ModuleType("vaderSentiment.vaderSentiment")
    module.SentimentIntensityAnalyzer = Analyzer
    monkeypatch.setitem(sys.modules, "vaderSentiment", package)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
    printed = run("sentiment.py", "--steps", 3)
    assert len(scores(printed)) == 3 and "The entrance of the restaurant was" in printed


def test_lora(run, tmp_path):
    printed = run("lora.py", tmp_path / "adapter", "--steps", 3)
    trained, of = map(int, re.search(r"(\d+) of (\d+) parameters are trained", printed).groups())
    assert 0 < trained < of and len(scores(printed)) == 3
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_reward_function(run):
    printed = run("reward_function.py", "--steps", 3)
    assert len(scores(printed)) == 3 and all(0 <= score <= 1 for score in scores(printed))


def test_reward_function_failures():
    names = runpy.run_path(str(EXAMPLES / "reward_function.py"))
    assert names["score_all"](["a few words", "", "excessively"]).tolist() == pytest.approx(
        [2 / 3, names["FALLBACK"], 0]
    )
    with pytest.raises(AttributeError):  # what is no expected failure stops the run
        names["score_all"]([None])


def test_reward_model(run, tmp_path):
    printed = run("reward_model.py", tmp_path, "--pairs", 256, "--steps", 2)
    accuracy = float(re.search(r"held-out pairs: (\S+)", printed)[1])
    assert accuracy > 0.75 and len(scores(printed)) == 2


def test_resume_goes_on_with_the_same_numbers(run, tmp_path):
    whole = run("resume.py", tmp_path / "whole", "--steps", 10)
    first = run("resume.py", tmp_path / "parts", "--steps", 5)
    rest = run("resume.py", tmp_path / "parts", "--steps", 10)
    assert "going on after step 5" in rest
    assert first + rest.replace("going on after step 5\n", "") == whole and len(scores(whole)) == 10


def test_the_notebook_prints_what_it_shows():
    cells = json.loads((EXAMPLES / "ops.ipynb").read_text())["cells"]
    names = {}
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 4
    for cell in code:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), names)
        shown = "".join(text for output in cell["outputs"] for text in output.get("text", []))
        assert printed.getvalue() == shown
