"""The three-stage demo from end to end in its quick size, and every way a user can break it."""

import json
import shutil
import struct
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_ext import demo
from ppo_ext.demo import requirements
from ppo_ext.demo.display import Display
from ppo_ext.demo.folder import RunFolder
from ppo_ext.demo.rlhf import corpus, gold, ppo, run, settings

SENTENCES = [
    f"The {noun} {verb} and nobody could say that the {noun} was {adjective}."
    for noun in ("cat", "function", "garden", "river")
    for verb in ("sat", "returned", "slept", "evaluated")
    for adjective in ("old", "considerable", "blue", "ready", "thin")
]


@pytest.fixture
def own_text(tmp_path, monkeypatch):
    """A user's corpus and a module with scorers, in a folder of their own."""
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    (tmp_path / "my_scorers.py").write_text(
        "calls = []\n"
        "def e_count(text): return text.count('e')\n"
        "def lengths(texts): return [len(t) for t in texts]\n"
        "def fails_on_many(texts):\n"
        "    if len(texts) > 2: raise ZeroDivisionError('division by zero')\n"
        "    return [1.0] * len(texts)\n"
        "def one_short(texts): return [1.0] * max(len(texts) - (len(texts) > 2), 1)\n"
        "def not_a_number(texts): return [float('nan')] * len(texts)\n"
        "def constant(texts): return [1.0] * len(texts)\n"
        "def words(text): return 'good'\n"
        "not_callable = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_scorers", raising=False)
    return tmp_path


def quick_arguments(folder, scorer="my_scorers:e_count"):
    return ["rlhf", "--quick", "--corpus", str(folder / "text.txt"), "--scorer", scorer, "--out", str(folder / "out")]


@pytest.mark.parametrize("scorer", ["my_scorers:e_count", "my_scorers:lengths"])
def test_scorers_of_texts_and_of_lists(own_text, scorer):
    metric = gold.load_scorer(scorer)
    assert metric(["eel", "bee!"]).tolist() == ([2.0, 2.0] if scorer.endswith("count") else [3.0, 4.0])


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("my_scorers", "--scorer must be package.module:function, got 'my_scorers'"),
        ("no_such_module:f", r"--scorer must be importable, got 'no_such_module:f' \(ModuleNotFoundError"),
        ("my_scorers:missing", "--scorer must be importable, .*no attribute 'missing'"),
        ("my_scorers:words", "--scorer must return a number .* 'good' for one text"),
        ("my_scorers:not_callable", "--scorer must return a number .*'int' object is not callable"),
        ("my_scorers:fails_on_many", "must not fail on any text, got ZeroDivisionError: division by zero"),
        (
            "my_scorers:not_a_number",
            "scorer my_scorers:not_a_number must return finite numbers, got nan for 'The first",
        ),
        ("my_scorers:one_short", "must return one number per text, got 2 for 3 texts"),
    ],
)
def test_bad_scorers_are_named(own_text, scorer, message):
    with pytest.raises(ValueError, match=message):
        gold.load_scorer(scorer)(["a", "b", "c"])


def test_a_scorer_that_cannot_tell_texts_apart_is_named(own_text):
    same = torch.ones(4)
    with pytest.raises(ValueError, match="scorer my_scorers:constant must tell texts apart, got 1.0 for all of them"):
        gold.load_scorer("my_scorers:constant").prefer_first(same, same, torch.Generator())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a quick run with all stages."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert demo.main(["rlhf", "--quick", "--out", str(out)]) == 0
    return out


def test_quick_run_from_end_to_end(finished):
    out = finished
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["gate"]
    assert list(summary["stages"]) == ["sft", "pairs", "reward", "before", "ppo", "control"]
    assert summary["passed"] is None
    assert summary["stages"]["before"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert all(stage["seconds"] > 0 for stage in summary["stages"].values())
    stages = [json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    sizes = settings.quick(0)
    assert stages.count("sft") == sizes.sft_steps
    assert stages.count("ppo") == sizes.ppo_steps
    assert stages.count("control") == sizes.control_steps
    assert len((out / "pairs.jsonl").read_text().splitlines()) == sizes.train_pairs + sizes.held_out_pairs
    assert len((out / "samples" / "ppo.jsonl").read_text().splitlines()) == sizes.eval_prompts
    assert "## " in (out / "samples.md").read_text()
    width, height = struct.unpack(">II", (out / "curves.png").read_bytes()[16:24])
    assert width > 1000
    assert height > 400
    for name in ("sft_model", "ppo_model", "control_model"):
        AutoModelForCausalLM.from_pretrained(out / name)
        AutoTokenizer.from_pretrained(out / name)
    reward_model = AutoModelForSequenceClassification.from_pretrained(out / "reward_model")
    assert reward_model.config.reward_gain > 0


def test_a_second_run_is_refused_then_resumed_then_overwritten(own_text, capsys):
    arguments = [*quick_arguments(own_text), "--no-control"]
    assert demo.main(arguments) == 0
    before = (own_text / "out" / "summary.json").read_bytes()
    assert demo.main(arguments) == 2
    assert "--out must be a folder without an earlier run" in " ".join(capsys.readouterr().out.split())
    assert demo.main([*arguments, "--resume"]) == 0
    assert (own_text / "out" / "summary.json").read_bytes() == before
    assert capsys.readouterr().out.count("kept from the earlier run") == 5
    assert demo.main([*arguments, "--resume", "--seed", "5"]) == 2
    assert "--resume must get the arguments of the earlier run, got seed 0 before and 5 now" in capsys.readouterr().out
    (own_text / "out" / "mine.txt").write_text("keep")
    assert demo.main([*arguments, "--overwrite"]) == 0
    assert (own_text / "out" / "mine.txt").read_text() == "keep"


def test_a_scorer_that_raises_loses_nothing_and_the_run_goes_on(own_text, capsys):
    arguments = [*quick_arguments(own_text, "my_scorers:fails_on_many"), "--no-control"]
    assert demo.main(arguments) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "got ZeroDivisionError: division by zero" in said
    assert "finished stages: sft" in said
    assert "--resume" in said
    assert "Traceback" not in said
    AutoModelForCausalLM.from_pretrained(own_text / "out" / "sft_model")
    (own_text / "my_scorers.py").write_text("def fails_on_many(texts): return [t.count('e') for t in texts]\n")
    del sys.modules["my_scorers"]
    assert demo.main([*arguments, "--resume"]) == 0
    assert (own_text / "out" / "summary.json").exists()


def test_ctrl_c_says_what_is_kept(own_text, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.stages, "label_pairs", interrupted)
    assert demo.main(quick_arguments(own_text)) == 130
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped by Ctrl-C" in said
    assert "finished stages: sft" in said


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_path_that_cannot_be_a_folder_is_named(own_text, capsys, below):
    (own_text / "file").write_text("")
    assert demo.main([*quick_arguments(own_text), "--out", str(own_text / "file" / below)]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "demo: --out must be a writable folder, got" in said
    assert "nothing was written" in said


def test_missing_extras_are_named(capsys, monkeypatch):
    monkeypatch.setattr(requirements, "_installed", lambda name: name != "rich")
    assert demo.main(["rlhf"]) == 2
    assert capsys.readouterr().err == "demo: rich must be installed; run: pip install 'ppo_ext[demo]'\n"


def test_a_failed_gate_is_exit_code_1(tmp_path, capsys, monkeypatch):
    small = settings.quick(0)
    monkeypatch.setattr(settings, "full", lambda seed: small)
    assert demo.main(["rlhf", "--no-control", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "✗ gold metric gains at least 12 points" in said
    assert "✓ KL to the SFT model is at most 10 nats" in said


def test_ppo_never_sees_the_gold_metric(finished, tmp_path):
    """Two gold metrics that contradict each other: the same training, step for step."""
    shutil.copytree(finished, tmp_path / "out")
    sizes = settings.quick(0)
    text = corpus.build_corpus(
        corpus.python_reference(), sizes.vocab_size, sizes.held_out_fraction, sizes.seed, Display()
    )
    arguments = json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]
    folder = RunFolder(tmp_path / "out", arguments, resume=True)
    logs = []
    for sign in (1.0, -1.0):
        folder.drop_log("ppo")
        metric = gold.GoldMetric("other", lambda texts, sign=sign: [sign * len(t) for t in texts])
        ppo.train_ppo(text, sizes, metric, folder, Display())
        logs.append(folder.read_log("ppo"))
    for one, other in zip(*logs, strict=True):
        assert one["gold"] == -other["gold"]
        assert one["rm_score"] == other["rm_score"]
        assert one["kl"] == other["kl"]
