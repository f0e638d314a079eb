"""The commands of examples/distributed.md, as far as a CPU without DeepSpeed runs them, and the page of collectives."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import tiny_models
import torch
from accelerate.commands.launch import launch_command_parser

import ppo_ext
from bench import count_collectives

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "examples/distributed.md").read_text()
COMMANDS = re.findall(r"^accelerate launch .*$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2")).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def test_accelerate_takes_the_three_commands():
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        options = launch_command_parser().parse_args(command.split()[2:])
        assert options.num_processes == 2 and options.training_script == "examples/reward_function.py"


@pytest.mark.parametrize("fsdp", ["false", "true"])
def test_two_processes_on_a_cpu_run_the_script(fsdp, folder):
    command = re.search(r"^torchrun (.*)$", PAGE, re.MULTILINE)[1].replace("MODEL_FOLDER", str(folder))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"ACCELERATE_USE_FSDP": fsdp, "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1"}  # as by accelerate launch
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *command.split(), "--steps", "1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(re.findall(r"step  0  score \S+  KL", result.stdout)) == 2, result.stdout
    assert ("accelerate leaves FSDP out on cpu" in result.stderr) == (fsdp == "true")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("command", COMMANDS, ids=["ddp", "fsdp2", "deepspeed"])
def test_the_commands_run_the_script_on_all_gpus(command, folder):
    if "--use_deepspeed" in command:
        pytest.importorskip("deepspeed")
    count = torch.cuda.device_count()
    words = (
        command.replace("--num_processes 2", f"--num_processes {count}").replace("MODEL_FOLDER", str(folder)).split()
    )
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words[2:], "--steps", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(re.findall(r"step  0  score \S+  KL", result.stdout)) == count, result.stdout


def test_the_page_of_collectives_is_of_its_row():
    row = json.loads((ROOT / "bench/evidence/collectives.json").read_text())
    assert (ROOT / "bench/evidence/collectives.md").read_text() == count_collectives.render(row)
    assert {entry["where"] for entry in row["collectives"]} == set(count_collectives.WHY)
