"""What SFTTrainer and RewardTrainer share: one update however it is split, resuming, callbacks, NaN, adapters."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny_models
import torch
from torch.nn.functional import logsigmoid
from transformers import GPT2Config, GPT2ForSequenceClassification, TrainerCallback

from ppo_ext import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
LENGTHS = (3, 9, 5, 2, 12, 7, 4)  # ragged, so that a mean of the batches' means is not the mean
KINDS = ("sft", "reward")


def rows(kind):
    sequences = [[(5 * i + j) % 40 + 3 for j in range(length)] for i, length in enumerate(LENGTHS)]
    if kind == "sft":
        return [{"input_ids": ids} for ids in sequences]
    return [
        {"input_ids_chosen": ids, "input_ids_rejected": ids[::-1][:4], "margin": 0.25 * i}
        for i, ids in enumerate(sequences)
    ]


def model(kind, dropout=0.0):
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    if kind == "sft":
        return tiny_models.build("gpt2", **rates)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=tiny_models.VOCAB, n_positions=48, n_embd=24, n_layer=2, n_head=2, num_labels=1,
        pad_token_id=tiny_models.PAD, **rates,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


def broken_model(kind):
    """Not finite at position 10, which only the fifth row has."""
    broken = model(kind)
    with torch.no_grad():
        broken.transformer.wpe.weight[10] = float("nan")
    return broken


def trainer(kind, folder, *, train=True, trained=None, **fields):
    """On the 7 rows in their order; fields are those of the config, or callbacks and peft_config."""
    arguments = {name: fields.pop(name) for name in ("callbacks", "peft_config", "eval_dataset") if name in fields}
    config, kind_of_trainer = {"sft": (SFTConfig, SFTTrainer), "reward": (RewardConfig, RewardTrainer)}[kind]
    config = config(output_dir=str(folder), **{**QUIET, **fields})
    ours = kind_of_trainer(trained or model(kind), config, train_dataset=rows(kind) if train else None, **arguments)
    ours._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(ours.train_dataset)
    return ours


def weights(ours):
    return {name: parameter.detach().clone() for name, parameter in ours.model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "steps"), [(1, 7), (2, 4), (4, 2), (3, 3)])
def test_accumulated_batches_make_the_update_of_one_large_batch(kind, size, steps, tmp_path):
    """Also where the last batch is smaller than the others."""
    common = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 2, "max_grad_norm": 0.0, "logging_steps": 1}
    whole = trainer(kind, tmp_path, per_device_train_batch_size=7, **common)
    split = trainer(kind, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **common)
    start = weights(whole)
    for ours in (whole, split):
        ours.train()
        assert ours.state.global_step == 2
    losses = [[record["loss"] for record in ours.state.log_history if "loss" in record] for ours in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    moved = max((after - start[name]).abs().max().item() for name, after in weights(whole).items())
    apart = max((after - weights(split)[name]).abs().max().item() for name, after in weights(whole).items())
    assert moved > 1e-2
    assert apart < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_reproduces_the_run(kind, tmp_path):
    """Bit for bit, with dropout, shuffling, a schedule and Adam's moments."""

    def run(folder, resume=None):
        torch.manual_seed(0)
        ours = trainer(
            kind, folder, trained=model(kind, dropout=0.2), learning_rate=1e-2, max_steps=6, save_strategy="steps",
            save_steps=3, per_device_train_batch_size=2, logging_steps=1,
        )  # fmt: skip
        del ours._get_train_sampler
        ours.train(resume_from_checkpoint=resume)
        return weights(ours), ours.state.log_history

    whole, history = run(tmp_path / "whole")
    resumed, history_resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert (tmp_path / "whole" / "checkpoint-3" / "model.safetensors").exists()
    losses, losses_resumed = ([r["loss"] for r in h if "loss" in r] for h in (history, history_resumed))
    assert losses == losses_resumed and len(losses) == 6
    for name, expected in whole.items():
        assert torch.equal(expected, resumed[name]), name


class Recorder(TrainerCallback):
    def __init__(self):
        self.steps, self.logs, self.evaluations = [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluations.append((state.global_step, metrics["eval_loss"]))


@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_see_every_update_and_evaluation(kind, tmp_path):
    recorder = Recorder()
    trainer(
        kind, tmp_path, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, eval_steps=2,
        eval_strategy="steps", eval_dataset=rows(kind), callbacks=[recorder], lr_scheduler_type="constant",
    ).train()  # fmt: skip
    assert recorder.steps == [1, 2, 3, 4]
    updates = [logs for logs in recorder.logs if "loss" in logs]
    assert len(updates) == 4 and all(logs["loss"] > 0 and logs["learning_rate"] == 1e-2 for logs in updates)
    assert [step for step, _ in recorder.evaluations] == [2, 4]
    assert recorder.evaluations[1][1] < recorder.evaluations[0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(kind, tmp_path):
    ours = trainer(kind, tmp_path, trained=broken_model(kind), per_device_train_batch_size=2, max_steps=4)
    seen = []

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(weights(ours))

    ours.add_callback(Remember())
    with pytest.raises(
        FloatingPointError, match=f"{type(ours).__name__}: loss must be finite, got nan at step 3; lower"
    ):
        ours.train()
    assert len(seen) == 2
    for name, parameter in weights(ours).items():
        assert torch.equal(parameter.nan_to_num(), seen[1][name].nan_to_num()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_is_trained(kind, checkpointing, tmp_path):
    peft = pytest.importorskip("peft")
    task = "CAUSAL_LM" if kind == "sft" else "SEQ_CLS"
    adapter = peft.LoraConfig(task_type=task, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    # reentrant checkpointing, the default before transformers 5, gives no gradient if no input of a layer needs one
    fields = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    ours = trainer(
        kind, tmp_path, peft_config=adapter, max_steps=2, learning_rate=1e-1, **(fields if checkpointing else {})
    )
    before = weights(ours)
    ours.train()
    changed = {name for name, after in weights(ours).items() if not torch.equal(after, before[name])}
    assert any("lora_" in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name for name in changed), changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["cp", "sp"])
def test_a_sequence_on_several_devices_is_refused(kind, split, tmp_path, monkeypatch):
    name = {"sft": "SFTTrainer", "reward": "RewardTrainer"}[kind]
    monkeypatch.setattr(f"transformers.Trainer.get_{split}_size", lambda self: 2, raising=False)
    with pytest.raises(ValueError, match=f"{name}: {split}_size must be 1, got 2; a sequence must stay on one device"):
        trainer(kind, tmp_path)


def test_the_update_is_the_mean_over_its_pairs(tmp_path):
    """One SGD step on all pairs against the gradient of the loss written out."""
    ours = trainer("reward", tmp_path, optim="sgd", learning_rate=0.1, max_steps=1, max_grad_norm=0.0,
                   per_device_train_batch_size=2, gradient_accumulation_steps=4, lr_scheduler_type="constant")  # fmt: skip
    by_hand = model("reward")
    losses = []
    for pair in rows("reward"):
        chosen, rejected = (by_hand(torch.tensor([pair[f"input_ids_{s}"]])).logits for s in ("chosen", "rejected"))
        losses.append(-logsigmoid(chosen - rejected - pair["margin"]))
    torch.stack(losses).mean().backward()
    ours.train()
    for name, parameter in by_hand.named_parameters():
        expected = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(weights(ours)[name], expected, rtol=1e-4, atol=1e-6, msg=name)


WORKER = """
import json, os, sys
import torch
torch.set_num_threads(1)
import test_supervised
rank, folder = os.environ["RANK"], sys.argv[1]
report = {}
for kind in test_supervised.KINDS:
    ours = test_supervised.trainer(kind, folder, optim="sgd", learning_rate=0.1, max_steps=1, max_grad_norm=0.0,
                                   per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
                                   lr_scheduler_type="constant", eval_dataset=test_supervised.rows(kind)[:6])
    ours.train()
    report[kind] = {"weights": [p.double().sum().item() for p in ours.model.parameters()],
                    "loss": ours.state.log_history[0]["loss"]}
    ours.args.per_device_eval_batch_size = 1
    report[kind]["eval_loss"] = ours.evaluate()["eval_loss"]
    try:  # the loss of the first process alone is not finite
        test_supervised.trainer(kind, folder, trained=test_supervised.broken_model(kind), max_steps=3,
                                per_device_train_batch_size=2).train()
    except FloatingPointError as error:
        report[kind]["error"] = str(error)
with open(os.path.join(folder, f"{rank}.json"), "w") as file:
    json.dump(report, file)
torch.distributed.barrier()  # a process that leaves early may abort the other
torch.distributed.destroy_process_group()
"""


def test_two_processes_make_the_update_of_one(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    tests = pathlib.Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(tests), str(tests.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker, tmp_path]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for kind in KINDS:
        # of 7 rows two processes with 2 rows each and 2 accumulated batches see all 7, and one of them again
        first, second = (report[kind] for report in reports)
        assert first["weights"] == second["weights"]
        assert first["loss"] == second["loss"] and first["eval_loss"] == second["eval_loss"]
        alone = trainer(
            kind, tmp_path, optim="sgd", learning_rate=0.1, max_steps=1, max_grad_norm=0.0, logging_steps=1,
            per_device_train_batch_size=8, lr_scheduler_type="constant", eval_dataset=rows(kind)[:6],
        )  # fmt: skip
        alone.train_dataset = [*alone.train_dataset, alone.train_dataset[0]]
        alone.train()
        sums = [parameter.double().sum().item() for parameter in alone.model.parameters()]
        assert first["weights"] == pytest.approx(sums, rel=1e-5, abs=1e-5)
        assert first["loss"] == pytest.approx(alone.state.log_history[0]["loss"], rel=1e-5)
        assert first["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-5)
        for report in (first, second):
            assert "loss must be finite, got nan at step 2" in report["error"]
