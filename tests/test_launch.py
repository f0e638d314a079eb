"""The commands of examples/distributed.md, as far as a CPU without DeepSpeed runs them, and the page of collectives."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import tiny_models

import ppo_ext
from bench import count_collectives

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = re.findall(r"^accelerate launch .*$", (ROOT / "examples/distributed.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2")).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["", "--use_fsdp"])
def test_the_command_runs_on_a_cpu(kind, folder):
    assert len(COMMANDS) == 3
    command = next(text for text in COMMANDS if (kind or "2 examples") in text).replace("MODEL_FOLDER", str(folder))
    arguments = command.replace("launch", "launch --cpu --num_cpu_threads_per_process 1").split()[1:]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments, "--steps", "1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(re.findall(r"step  0  score \S+  KL", result.stdout)) == 2
    assert ("accelerate leaves FSDP out on cpu" in result.stderr) == bool(kind)


def test_the_page_of_collectives_is_of_its_row():
    row = json.loads((ROOT / "bench/evidence/collectives.json").read_text())
    assert (ROOT / "bench/evidence/collectives.md").read_text() == count_collectives.render(row)
    assert {entry["where"] for entry in row["collectives"]} == set(count_collectives.WHY)
