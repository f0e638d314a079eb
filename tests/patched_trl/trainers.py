"""TRL's trainers for some steps with and without the patch: the same losses and weights."""

import contextlib
import pathlib
import re
import runpy
import sys

import pytest
import tiny_models
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer import utils

import ppo_ext
from ppo_ext.demo.sentiment import tiny
from ppo_ext.integrations import trl_functions

EXAMPLES = pathlib.Path(__file__).parent.parent.parent / "examples"
STEPS = 3
PROMPTS = [f"w{5 + i} w{9 + i} w{4 + i} " for i in range(12)]
ANSWERS = [f"w{20 + i} w{7 + i}" for i in range(12)]
OTHERS = [f"w{30 + i} w{3 + i} w{11 + i}" for i in range(12)]
COMMON = {
    "learning_rate": 1e-2,
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "optim": "sgd",
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 3,
}


def sft(model, tokenizer, folder):
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": [p + a for p, a in zip(PROMPTS, ANSWERS)]})
    return SFTTrainer(model, SFTConfig(folder, **COMMON), train_dataset=data, processing_class=tokenizer)


def dpo(model, tokenizer, folder):
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_dict({"prompt": PROMPTS, "chosen": ANSWERS, "rejected": OTHERS})
    return DPOTrainer(model, args=DPOConfig(folder, **COMMON), train_dataset=data, processing_class=tokenizer)


def kto(model, tokenizer, folder):
    from trl import KTOConfig, KTOTrainer

    label = [i % 2 == 0 for i in range(12)]
    data = Dataset.from_dict({"prompt": PROMPTS, "completion": ANSWERS, "label": label})
    reference = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    config = KTOConfig(folder, **COMMON)
    return KTOTrainer(model, reference, config, train_dataset=data, processing_class=tokenizer)


def _reward(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


def grpo(model, tokenizer, folder):
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(folder, **COMMON, num_generations=4, max_completion_length=6, beta=0.1, temperature=0.7)
    data = Dataset.from_dict({"prompt": PROMPTS})
    return GRPOTrainer(model, _reward, config, train_dataset=data, processing_class=tokenizer)


def rloo(model, tokenizer, folder):
    from trl import RLOOConfig, RLOOTrainer

    config = RLOOConfig(folder, **COMMON, num_generations=4, max_completion_length=6, temperature=0.7)
    data = Dataset.from_dict({"prompt": PROMPTS})
    return RLOOTrainer(model, _reward, config, train_dataset=data, processing_class=tokenizer)


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of ppo_ext's ops that the replacements make, so that a test can tell that they were in use."""
    counts = {"count": 0}

    def counted(function):
        def call(*arguments, **keywords):
            counts["count"] += 1
            return function(*arguments, **keywords)

        return call

    for name in ("logprobs", "logprobs_and_entropy", "linear_statistics"):
        monkeypatch.setattr(trl_functions, name, counted(getattr(trl_functions, name)))
    return counts


@contextlib.contextmanager
def patched(active):
    if not active:
        yield
        return
    assert ppo_ext.patch_trl()
    try:
        yield
    finally:
        assert ppo_ext.unpatch_trl()


def _saved_model(folder):
    """The same model each time, on disk, from where DPO loads its reference."""
    torch.manual_seed(1)
    path = str(folder / "model")
    tiny_models.llama().save_pretrained(path)
    return path


def trained(make, folder, active):
    """(losses, weights, entropies) of a run of STEPS steps."""
    model = AutoModelForCausalLM.from_pretrained(_saved_model(folder))
    with patched(active):
        trainer = make(model, tiny_models.tokenizer(), str(folder))
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    return [e["loss"] for e in logged], weights, [e["entropy"] for e in logged if "entropy" in e]


@pytest.mark.parametrize("make", [sft, dpo, kto, grpo, rloo])
def test_the_same_training_with_and_without_the_patch(make, tmp_path, calls):
    without_original = utils._ChunkedLogProbFunction is None  # TRL 1.15 trains nothing where there is no Triton
    own_loss = make is sft and not hasattr(utils, "add_fused_lm_head")  # up to TRL 1.14, SFT has a function of its own
    losses, weights, entropies = trained(make, tmp_path / "ours", True)
    assert len(losses) == STEPS and (calls["count"] > 0) != own_loss
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    if without_original:
        return
    calls["count"] = 0
    expected_losses, expected_weights, expected_entropies = trained(make, tmp_path / "theirs", False)
    assert calls["count"] == 0
    # both logged numbers are rounded to a few digits
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(torch.tensor(entropies), torch.tensor(expected_entropies), rtol=1e-4, atol=2e-4)
    start = dict(AutoModelForCausalLM.from_pretrained(_saved_model(tmp_path)).named_parameters())
    moved = 0.0
    for name, weight in expected_weights.items():
        change, expected_change = weights[name] - start[name], weight - start[name]
        scale = expected_change.abs().max().item()
        moved = max(moved, scale)
        torch.testing.assert_close(change, expected_change, rtol=1e-3, atol=1e-3 * scale + 1e-7)
    assert moved > 1e-6


def test_the_example(tmp_path, monkeypatch, capsys, calls):
    folder = tmp_path / "model"
    tiny.save_model(folder, ["The city on the river", "good or bad, the report says that it is"] * 3, seed=0)
    monkeypatch.setattr(sys, "argv", ["grpo_with_trl.py", str(folder), "--steps", "2", "--out", str(tmp_path / "out")])
    try:
        runpy.run_path(str(EXAMPLES / "grpo_with_trl.py"), run_name="__main__")
    finally:
        ppo_ext.unpatch_trl()
    printed = capsys.readouterr().out
    assert "computed by ppo_ext: trl.trainer.utils.selective_log_softmax" in printed and calls["count"] > 0
    assert len(re.findall(r"^step .* score \d", printed, re.MULTILINE)) == 2
    assert (tmp_path / "out" / "model.safetensors").exists()
