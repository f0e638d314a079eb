"""What is wrong on one process is raised by all, in the same words; then all go on. A process that dies is told of."""

import functools
import itertools
import os
import pathlib
import random
import re
import signal
import time
import warnings

import numpy as np
import process_group
import pytest
import test_supervised
import tiny_models
import torch
from interruptions import STEP, Lines

from ppo_ext import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from ppo_ext.models import checkpoint
from ppo_ext.models.auto import AutoModelForCausalLMWithValueHead
from ppo_ext.trainer import resume, saving

KILLS = 10
CPU = {"accelerator_kwargs": {"cpu": True}, "mini_batch_size": 4, "ppo_epochs": 1, "use_score_scaling": True}


def make(**config):
    return tiny_models.trainer(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **{**CPU, **config})


def batch(rank, seed=0):
    return list(tiny_models.batch(4, 10 * seed + rank))


# ---- errors ----------------------------------------------------------------------------------------------------------


def step_with(change):
    """A step whose batch, or trainer, is changed on process 1."""

    def call(trainer, rank, folder):
        given = batch(rank)
        if rank == 1:
            change(trainer, given)
        try:
            trainer.step(*given)
        finally:
            trainer.config.gamma, trainer.config.lam, trainer.config.batch_size = 1.0, 0.95, 4

    return call


def set_config(**fields):
    return step_with(lambda trainer, given: [setattr(trainer.config, name, x) for name, x in fields.items()])


def replace(index, row, value):
    return step_with(lambda trainer, given: given[index].__setitem__(row, value))


def poison_reference(trainer, given):
    trainer.ref_model.v_head.poisoned = trainer.ref_model.get_parameter("pretrained_model.lm_head.weight").data
    kept = trainer.ref_model.v_head.poisoned.clone()
    trainer.ref_model.v_head.poisoned.fill_(float("nan"))
    after.append(lambda: trainer.ref_model.v_head.poisoned.copy_(kept))


after = []  # what puts things right again


def failing_at(call_number, *path):
    """A step in which a method of the trainer, or of a module of its, runs out of memory on process 1."""
    *path, name = path

    def call(trainer, rank, folder):
        owner = functools.reduce(getattr, path, trainer)
        method, calls = getattr(owner, name), itertools.count(1)

        def fails(*args, **kwargs):
            if rank == 1 and next(calls) == call_number:
                raise torch.OutOfMemoryError("out of memory")
            return method(*args, **kwargs)

        setattr(owner, name, fails)
        trainer.config.mini_batch_size, trainer.config.gradient_accumulation_steps = 1, 2
        try:
            trainer.step(*batch(rank))
        finally:
            vars(owner).pop(name)
            trainer.config.mini_batch_size, trainer.config.gradient_accumulation_steps = 4, 1

    return call


def save_while_the_others_step(trainer, rank, folder):
    if rank == 1:
        trainer.save_pretrained(folder / "alone")
    else:
        trainer.step(*batch(rank))


def log_on_the_main_process(trainer, rank, folder):
    if rank == 0:
        trainer.log_stats({}, {}, [1.0] * 4)
    else:
        trainer.step(*batch(rank))


def log(trainer, rank, folder):
    trainer.log_stats({}, {}, ["none" if rank == 1 else 1.0])


def no_masks(trainer, rank, folder):
    queries, responses, scores = batch(rank)
    trainer.step(queries, responses, scores, [torch.zeros_like(ids) for ids in responses])


def save_with_another_generator(trainer, rank, folder):
    state = np.random.get_state()
    try:
        if rank == 1:
            np.random.set_bit_generator(np.random.PCG64(1))
        trainer.save_run(folder / "other")
    finally:
        np.random.set_bit_generator(np.random.MT19937())
        np.random.set_state(state)


def load_damaged(trainer, rank, folder):
    path = folder / f"own{rank}"
    trainer.save_run(folder / "whole")
    path.mkdir(exist_ok=True)
    data = bytearray((folder / "whole" / resume.STATE_FILE).read_bytes())
    data[-5] ^= rank
    (path / resume.STATE_FILE).write_bytes(data)
    trainer.load_run(path)


def load_without_file(trainer, rank, folder):
    trainer.load_run(folder / ("whole" if rank == 0 else "nowhere"))


def optimizer_refuses(trainer, rank, folder):
    optimizer = trainer.optimizer
    if rank == 1:
        optimizer.load_state_dict, calls = lambda state: calls.append(0) or 1 / (len(calls) - 1), []
    try:
        trainer.load_run(folder / "whole")
    finally:
        vars(optimizer).pop("load_state_dict", None)


def save_on_a_full_disk(trainer, rank, folder):
    def full(*_):
        raise OSError(28, "No space left on device")

    kept = saving.staged
    try:
        saving.staged = full
        trainer.save_pretrained(folder / "model")
    finally:
        saving.staged = kept


def train_supervised(kind, rows, folder):
    config, owner = {"sft": (SFTConfig, SFTTrainer), "reward": (RewardConfig, RewardTrainer)}[kind]
    config = config(output_dir=str(folder / kind), max_steps=1, **test_supervised.QUIET)
    trainer = owner(test_supervised.model(kind), config, train_dataset=rows)
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).double().sum().item()


def supervised(kind, bad):
    def call(trainer, rank, folder):
        rows = test_supervised.rows(kind)
        if rank == 1:
            bad(rows)
        train_supervised(kind, rows, folder)

    return call


FAULTS = {
    "score": (replace(2, 3, float("nan")), r"PPOTrainer.step: scores\[3\] must be finite in float32, got nan"),
    "id": (replace(1, 0, torch.tensor([5, 48])), r"PPOTrainer.step: responses\[0\]\[1\] must lie in .* got 48"),
    "type": (replace(0, 1, [5, 6]), r"PPOTrainer.step: queries\[1\] must be a 1-D tensor of token ids, got list"),
    "length": (step_with(lambda t, given: given[2].pop()), r"PPOTrainer.step: scores must have config.batch_size = 4"),
    "config": (set_config(gamma=2.0), r"PPOConfig: gamma must lie in \[0, 1\], got 2.0"),
    "another config": (
        set_config(lam=0.5),
        "PPOConfig.lam must be the same .* got 0.95 on process 0 and 0.5 on process 1",
    ),
    "loss": (step_with(poison_reference), "the loss must be finite, got .* infinite returns: .*update was not made"),
    "first part": (failing_at(1, "loss"), "out of memory"),
    "last part": (failing_at(2, "loss"), "out of memory"),
    "in the model": (failing_at(6, "model", "module", "pretrained_model", "transformer", "forward"), "out of memory"),
    "reference": (failing_at(2, "ref_model", "pretrained_model", "transformer", "forward"), "out of memory"),
    "rewards": (failing_at(1, "compute_rewards"), "out of memory"),
    "another call": (
        save_while_the_others_step,
        "must call the same, got step on process 0 and save_pretrained on process 1",
    ),
    "logs alone": (
        log_on_the_main_process,
        "must call the same, got log_stats on process 0 and step on process 1",
    ),
    "logs": (log, "could not convert string to float: 'none'"),
    "no token": (no_masks, "response_masks must leave a token that counts on at least one process, got none"),
    "generator": (save_with_another_generator, "save_run: numpy's global generator must be MT19937, got PCG64"),
    "damaged": (load_damaged, "own1/trainer_state.safetensors must be as it was written, got another SHA-256"),
    "file": (load_without_file, "nowhere/trainer_state.safetensors must exist"),
    "optimizer": (optimizer_refuses, "load_run: optimizer must take its state in .*, got division by zero"),
    "disk": (save_on_a_full_disk, "No space left on device"),
}
SUPERVISED = {
    "sft": (supervised("sft", lambda rows: rows[2].clear()), r"SFTTrainer: train_dataset\[2\] must hold input_ids"),
    "reward": (supervised("reward", lambda rows: rows[1].clear()), r"RewardTrainer: train_dataset\[1\]"),
    "sft size": (
        supervised("sft", lambda rows: rows.pop()),
        r"must have as many examples on all processes, got \[7, 6\]",
    ),
    "reward size": (supervised("reward", lambda rows: rows.pop()), r"examples on all processes, got \[7, 6\]"),
}
ALL_FAULTS = FAULTS | SUPERVISED
ALIKE = (
    "no token",
    "another call",
    "logs alone",
    "another config",
    "sft size",
    "reward size",
)  # the sentence is about all processes


def error_of(call, trainer, rank, folder):
    try:
        call(trainer, rank, folder)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        while after:
            after.pop()()
    return None


def facts(trainer):
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return weights.double().sum().item(), trainer.kl_ctl.value, trainer.running.mean


def errors(rank, folder):
    trainer = make()
    trainer.step(*batch(rank))
    found = {}
    for name, (call, _) in FAULTS.items():
        before = facts(trainer)
        error = error_of(call, trainer, rank, folder)
        unchanged = facts(trainer)[:2] == before[:2]
        trainer.step(*batch(rank, 1))
        found[name] = (error, unchanged, facts(trainer))
    return found


def supervised_errors(rank, folder):
    """After these no PPOTrainer of the same process goes on: transformers' arguments set accelerate's state anew."""
    found = {}
    for name, (call, _) in SUPERVISED.items():
        error = error_of(call, None, rank, folder)
        kind = name.split()[0]
        found[name] = (error, True, train_supervised(kind, test_supervised.rows(kind), folder))
    return found


# ---- resuming and saving ---------------------------------------------------------------------------------------------


def go_on(trainer, rank, first, last):
    trail = []
    for i in range(first, last):
        queries, _, scores = batch(rank, 5 + i)
        responses = trainer.generate(
            queries, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=6, min_new_tokens=3, pad_token_id=0
        )
        stats = trainer.step(queries, responses, scores)
        trail.append({key: value for key, value in stats.items() if not key.startswith("time/")})
        trail[-1]["drawn"] = (random.random(), np.random.rand(), torch.rand(()).item(), trainer.kl_ctl.value)
        trail[-1]["responses"] = [ids.tolist() for ids in responses]
    return trail


def resuming(rank, folder):
    config = {"mini_batch_size": 1, "gradient_accumulation_steps": 2, "ppo_epochs": 2}
    whole = make(**config)
    expected = go_on(whole, rank, 0, 3)
    stopped = make(**config)
    go_on(stopped, rank, 0, 1)
    stopped.save_run(folder / "run")
    resumed = make(**config)
    go_on(resumed, rank, 7, 8)  # load_run must overwrite whatever this changed
    resumed.load_run(folder / "run")
    got = go_on(resumed, rank, 1, 3)
    same = all(np.array_equal(a[key], b[key]) for a, b in zip(got, expected[1:], strict=True) for key in b)
    return same, facts(whole), facts(resumed), expected[0]["responses"]


class Hub:
    """Counts what is pushed, and by which process."""

    def __init__(self, rank):
        self.rank, self.pushed = rank, []

    def __call__(self, folder, repo_id, **kwargs):
        self.pushed.append((self.rank, repo_id, sorted(os.listdir(folder))))
        return "url"


def pushing(rank, folder):
    trainer = make(push_to_hub_if_best_kwargs={"repo_id": "me/best"}, use_score_scaling=False)
    trainer._upload = hub = Hub(rank)
    highest = []
    # on process 0 the second scores are better, over both they are not
    for own, other in ((1.0, 1.0), (2.0, -2.0), (0.0, 3.0)):
        queries, responses, _ = batch(rank)
        trainer.step(queries, responses, [own if rank == 0 else other] * 4)
        highest.append(float(trainer.highest_reward))
    returned = trainer.save_pretrained(folder / "pushed", push_to_hub=True, repo_id="me/all")
    there = sorted(os.listdir(folder / "pushed"))  # on every process, whoever wrote
    return highest, hub.pushed, returned, there


def work(rank, folder):
    warnings.simplefilter("ignore")
    folder = pathlib.Path(folder)
    report = {"errors": errors(rank, folder), "resuming": resuming(rank, folder), "pushing": pushing(rank, folder)}
    report["errors"] |= supervised_errors(rank, folder)
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def reports(folder):
    return process_group.run(__file__, {"work": 2}, folder)["work"]


@pytest.mark.parametrize("name", ALL_FAULTS)
def test_what_is_wrong_on_one_process_is_raised_by_all_and_all_go_on(reports, name):
    (first, unchanged, facts), *others = [report["errors"][name] for report in reports]
    assert first is not None and unchanged
    assert re.search(ALL_FAULTS[name][1], first[1]), first
    assert name in ALIKE or f"(process {0 if name == 'disk' else 1} of 2)" in first[1]
    for other in others:
        assert other == (first, True, facts)


def test_resuming_two_processes_changes_no_bit(reports):
    for report in reports:
        same, whole, resumed, _ = report["resuming"]
        assert same and whole == resumed
    assert reports[0]["resuming"][3] != reports[1]["resuming"][3], "each process samples for itself"


def test_another_number_of_processes_is_refused(reports, folder):
    trainer = make(mini_batch_size=1, gradient_accumulation_steps=2, ppo_epochs=2)
    with pytest.raises(ValueError, match="load_run: the number of processes must be 2 as in .*, got 1"):
        trainer.load_run(folder / "run")


def test_the_best_model_is_that_of_all_scores_and_one_process_pushes(reports):
    (highest, pushed, returned, there), (other_highest, other_pushed, other_returned, other_there) = (
        report["pushing"] for report in reports
    )
    assert highest == other_highest == [1.0, 1.0, 1.5]
    assert [repo for _, repo, _ in pushed] == ["me/best", "me/best", "me/all"] and other_pushed == []
    assert all(
        {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files) for *_, files in pushed
    )
    assert (returned, other_returned) == ("url", None) and there == other_there and "model.safetensors" in there


# ---- departures ------------------------------------------------------------------------------------------------------


def _end_later():
    """Ends this process when the other one waits for it: gloo may abort a process that computes while its partner goes."""
    time.sleep(5)
    os._exit(1)


def interrupted(rank, folder):
    """Ctrl-C in the loss of process 1, whose step the others are in; it ends some time later."""
    warnings.simplefilter("ignore")
    trainer, path = make(), pathlib.Path(folder) / f"left{rank}"
    if rank == 1:
        trainer.loss = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGINT)
    found = []
    for call in (lambda: trainer.step(*batch(rank)), lambda: trainer.save_pretrained(folder)):
        try:
            call()
        except (KeyboardInterrupt, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {error}")
    path.write_text("\n".join(found))
    if rank == 1:
        _end_later()


def collator_fails(rank, folder):
    """An error in the supervised training of process 1, which ends some time later."""
    warnings.simplefilter("ignore")
    path = pathlib.Path(folder) / f"supervised{rank}"
    config = SFTConfig(output_dir=str(folder), max_steps=1, **test_supervised.QUIET)
    trainer = SFTTrainer(test_supervised.model("sft"), config, train_dataset=test_supervised.rows("sft"))
    if rank == 1:
        trainer.data_collator = lambda rows: rows[99]
    try:
        trainer.train()
    except Exception as error:
        path.write_text(f"{type(error).__name__}: {error}")
    if rank == 1:
        _end_later()


def test_a_process_that_leaves_a_step_says_why_and_takes_part_in_nothing_more(folder):
    process_group.run(__file__, {"interrupted": 2}, folder, may_die=["interrupted"])
    first, second = ((folder / f"left{rank}").read_text().splitlines() for rank in (0, 1))
    lost = "RuntimeError: ppo_ext: all processes must go on, got process 1, which has left by KeyboardInterrupt; "
    assert len(first) == 2 and all(text.startswith(lost) for text in first)
    assert second[0] == "KeyboardInterrupt: " and len(second) == 2
    assert "this process must not go on, since it has left a step in which the others were, by Keyb" in second[1]


def test_a_process_that_leaves_supervised_training_says_why(folder):
    process_group.run(__file__, {"collator_fails": 2}, folder, may_die=["collator_fails"])
    first, second = ((folder / f"supervised{rank}").read_text() for rank in (0, 1))
    assert second == "IndexError: list index out of range"
    assert "all processes must go on, got process 1, which has left by IndexError: list index out of range; " in first


# ---- deaths ----------------------------------------------------------------------------------------------------------


def killed(rank, folder, point):
    """One process is killed while both step and save; returns what the other one raises."""
    warnings.simplefilter("ignore")
    folder = pathlib.Path(folder) / str(point)
    trainer = make()

    def save():
        trainer.step(*batch(rank, point))
        trainer.save_run(folder)
        trainer.save_pretrained(folder / "model")

    save()
    with Lines(packages=(*STEP, "transformers/modeling_utils")) as lines:
        save()
    victim = rank == point % 2
    at = lines.count * point // KILLS if victim else None
    try:
        with Lines(lambda: os.kill(os.getpid(), signal.SIGKILL), at, (*STEP, "transformers/modeling_utils")):
            save()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_process_that_dies_is_told_of_and_breaks_no_file(folder):
    points = [f"killed {point}" for point in range(KILLS)]
    found = process_group.run(__file__, dict.fromkeys(points, 2), folder, may_die=points)
    for point, name in enumerate(points):
        assert found[name][point % 2] is None, "this process was to be killed"
        assert "all processes must go on, got one that has ended or no longer answers" in found[name][1 - point % 2]
        state = folder / str(point) / resume.STATE_FILE
        checkpoint.check_digest(state)
        resume._parse(os.fspath(state))
        AutoModelForCausalLMWithValueHead.from_pretrained(folder / str(point) / "model")
