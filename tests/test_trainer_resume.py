"""A run that is stopped and resumed has the same bits as one that was not stopped."""

import random

import numpy as np
import pytest
import tiny_models
import torch

from ppo_ext.models import checkpoint
from ppo_ext.trainer.resume import STATE_FILE


def make(**options):
    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)

    trainer = tiny_models.trainer(use_score_scaling=True, use_score_norm=True, optimizer=adam, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer.optimizer, gamma=0.9)
    trainer.lr_scheduler = trainer.accelerator.prepare(schedule)
    return trainer


def go_on(trainer, first, last):
    """Steps on sampled responses; returns the statistics of each and the random numbers drawn after it."""
    trail = []
    for i in range(first, last):
        queries, _, scores = tiny_models.batch(4, 50 + i)
        responses = trainer.generate(
            queries, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=6, min_new_tokens=3, pad_token_id=0
        )
        stats = trainer.step(queries, responses, scores)
        trail.append({key: value for key, value in stats.items() if not key.startswith("time/")})
        trail[-1]["drawn"] = (random.random(), np.random.rand(), torch.rand(()).item(), trainer.kl_ctl.value)
    return trail


def lora():
    peft = pytest.importorskip("peft")
    return {"name": "llama", "peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}


@pytest.mark.parametrize("options", [dict, lora])
def test_resuming_changes_no_bit(tmp_path, options):
    whole = make(**options())
    expected = go_on(whole, 0, 4)
    stopped = make(**options())
    assert [row["drawn"] for row in go_on(stopped, 0, 2)] == [row["drawn"] for row in expected[:2]]
    stopped.save_run(tmp_path)
    resumed = make(**options())
    go_on(resumed, 7, 8)  # load_run must overwrite whatever this changed
    resumed.load_run(tmp_path)
    for got, row in zip(go_on(resumed, 2, 4), expected[2:], strict=True):
        for key, value in row.items():
            assert np.array_equal(got[key], value), key
    for name, parameter in tiny_models.weights(whole).items():
        assert torch.equal(resumed.accelerator.unwrap_model(resumed.model).get_parameter(name), parameter), name
    assert (
        resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.9**4)
    )


def test_a_damaged_file_changes_nothing(tmp_path):
    trainer = make()
    go_on(trainer, 0, 1)
    trainer.save_run(tmp_path)
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    before = tiny_models.weights(trainer)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        trainer.load_run(tmp_path)
    with pytest.raises(ValueError, match="trainer_state.safetensors must exist"):
        trainer.load_run(tmp_path / "elsewhere")
    for name, parameter in tiny_models.weights(trainer).items():
        assert torch.equal(parameter, before[name])


def test_another_model_is_refused(tmp_path):
    make().save_run(tmp_path)
    with pytest.raises(ValueError, match="load_run: the state dict must hold "):
        make(name="llama").load_run(tmp_path)
    checkpoint.write_tensors(tmp_path / STATE_FILE, {"x": torch.ones(1)})
    with pytest.raises(ValueError, match="must be written by save_run, got 1 other tensors"):
        make().load_run(tmp_path)


def test_another_number_of_processes_is_refused(tmp_path):
    trainer = make()
    trainer.save_run(tmp_path)
    tensors = checkpoint.read_tensors(tmp_path / STATE_FILE)
    tensors["random.torch"] = tensors["random.torch"].repeat(2, 1)
    checkpoint.write_tensors(tmp_path / STATE_FILE, tensors)
    with pytest.raises(ValueError, match="load_run: the number of processes must be 2, got 1"):
        trainer.load_run(tmp_path)
