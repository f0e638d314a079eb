"""A run that is stopped and resumed has the same bits as one that was not stopped."""

import copy
import json
import os
import random

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import assert_unmoved, steps
from torch.optim import lr_scheduler

from ppo_ext.models import checkpoint
from ppo_ext.trainer.fingerprint import fingerprint
from ppo_ext.trainer.kl_controller import FixedKLController
from ppo_ext.trainer.plain_data import difference
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
    checkpoint.write_tensors(path, {"x": torch.ones(1)}, digest=True)
    with pytest.raises(ValueError, match="must be written by save_run, got 1 other tensors"):
        trainer.load_run(tmp_path)
    assert_unmoved(before, trainer)


def test_every_flipped_bit_is_noticed(tmp_path):
    trainer = make()
    steps(trainer)
    trainer.save_run(tmp_path)
    path, state = tmp_path / STATE_FILE, random.Random(0)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [state.randrange(header) for _ in range(100)] + [state.randrange(len(whole)) for _ in range(200)]
    before, noticed = tiny_models.weights(trainer), 0
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << state.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=STATE_FILE):
            trainer.load_run(tmp_path)
        noticed += 1
    assert noticed == 300
    assert_unmoved(before, trainer)


def altered(**tensors):
    """Changes tensors of a saved file and writes it again with a digest that is right."""

    def alter(trainer, path):
        found = checkpoint.read_tensors(path)
        for name, change in tensors.items():
            found[name.replace("__", ".")] = change(found[name.replace("__", ".")])
        checkpoint.write_tensors(path, found, digest=True)

    return alter


def in_state(change):
    """Changes the JSON of a saved file."""

    def alter(state):
        content = json.loads(state.numpy().tobytes())
        change(content["state"])
        return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)

    return altered(state=alter)


def nan_rate(state):
    state["optimizer"]["param_groups"][0]["lr"] = float("nan")


def moments_missing(trainer, path):
    found = checkpoint.read_tensors(path)
    del found["optimizer.state.1.exp_avg"]
    checkpoint.write_tensors(path, found, digest=True)


def other_base(trainer, path):
    with torch.no_grad():
        trainer.ref_model.pretrained_model.transformer.h[1].mlp.c_fc.weight[3, 5] += 1e-6


def with_optimizer(optimizer):
    def alter(trainer, path):
        trainer.optimizer = trainer.accelerator.prepare(optimizer(list(trainer.model.parameters())))

    return alter


def set_on(attribute, value):
    def alter(trainer, path):
        setattr(trainer, attribute, value)

    return alter


def config(**fields):
    def alter(trainer, path):
        for name, value in fields.items():
            setattr(trainer.config, name, value)

    return alter


def constant(trainer, path):
    schedule = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer.optimizer)
    trainer.lr_scheduler = trainer.accelerator.prepare(schedule)


def two_groups(parameters):
    return torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:]}])


class Controller(FixedKLController):
    pass


REFUSED = {
    "another checkpoint as reference": (other_base, "the checksum of the reference must be .* got"),
    "another optimizer": (
        with_optimizer(torch.optim.Adam),
        r"the optimizer must be torch\.optim\.adamw\.AdamW .* got .*Adam",
    ),
    "another order of parameters": (
        with_optimizer(lambda parameters: torch.optim.AdamW(parameters[::-1])),
        "the optimizer's groups.0.0 must be .*wte.weight .* got v_head",
    ),
    "more groups": (with_optimizer(two_groups), "the optimizer's groups.number must be 1 .* got 2"),
    "fewer parameters": (
        with_optimizer(lambda parameters: torch.optim.AdamW(parameters[:4])),
        r"the optimizer's groups.0.size must be \d+ .* got 4",
    ),
    "no schedule": (set_on("lr_scheduler", None), "lr_scheduler must be .*ExponentialLR .* got builtins.NoneType"),
    "another schedule": (constant, "lr_scheduler must be .*ExponentialLR .* got .*ConstantLR"),
    "another controller": (
        set_on("kl_ctl", Controller(0.2)),
        "kl_ctl must be .*AdaptiveKLController .* got .*Controller",
    ),
    "another setting": (config(cliprange=0.3), "PPOConfig.cliprange must be 0.2 .* got 0.3; set it before load_run"),
    "another batch": (config(mini_batch_size=4), "PPOConfig.mini_batch_size must be 2 .* got 4"),
    "a NaN rate": (in_state(nan_rate), "the learning rate of group 0 must be finite, got nan"),
    "a NaN coefficient": (
        in_state(lambda state: state["kl_ctl"].update(value=float("nan"))),
        "kl_ctl.value must be finite, got nan",
    ),
    "no moment": (moments_missing, "must be written by save_run, got KeyError: 'optimizer.state.1.exp_avg'"),
    "a short random state": (altered(random__torch=lambda x: x[:, :-8]), "the random state torch as"),
    "a wrong random state": (altered(random__numpy=lambda x: x - 2**40), "random states that the generators take"),
    "a random state of another type": (altered(random__python=lambda x: x.float()), "the random state python as"),
    "no JSON": (altered(state=lambda x: x[:-1]), "must be written by save_run, got JSONDecodeError"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_a_bit_is_refused_before_anything_changes(tmp_path, case):
    alter, text = REFUSED[case]
    saving, trainer = make(), make()
    steps(saving)
    saving.save_run(tmp_path)
    alter(trainer, tmp_path / STATE_FILE)
    before, rates = tiny_models.weights(trainer), [group["lr"] for group in trainer.optimizer.param_groups]
    random.seed(5)
    drawn = random.getstate(), torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"^load_run: .*{text}") as refused:
        trainer.load_run(tmp_path)
    assert str(tmp_path / STATE_FILE) in str(refused.value)
    assert_unmoved(before, trainer)
    assert random.getstate() == drawn[0] and torch.equal(torch.get_rng_state(), drawn[1])
    assert rates == [group["lr"] for group in trainer.optimizer.param_groups] and not trainer.optimizer.state


def adapter(**options):
    peft = pytest.importorskip("peft")
    return {
        "peft_config": peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})
    }


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"name": "gpt2"}, "the model's class must be .*LlamaForCausalLM .* got .*GPT2LMHeadModel"),
        (
            {"name": "llama", "changes": {"rms_norm_eps": 1e-5}},
            "the model's config.rms_norm_eps must be 1e-06 .* got 1e-05",
        ),
        ({"name": "llama"}, "the adapters.default must be .* got None"),
        ({"name": "llama", "lora_alpha": 16}, "the adapters.default.lora_alpha must be 8 .* got 16"),
        ({"name": "llama", "r": 4}, "the adapters.default.r must be 2 .* got 4"),
        ({"name": "llama", "padding_side": "left", "r": 2}, "the tokenizer's padding_side must be right .* got left"),
        ({"name": "llama", "frozen": 1e-6, "r": 2}, "the checksum of the frozen weights must be .* got"),
    ],
)
def test_another_model_is_refused(tmp_path, other, text):
    tiny_models.trainer("llama", **adapter()).save_run(tmp_path)
    lora = {name: other.pop(name) for name in ("lora_alpha", "r") if name in other}
    frozen = other.pop("frozen", 0)
    trainer = tiny_models.trainer(**other, **(adapter(**lora) if lora else {}))
    with torch.no_grad():
        next(trainer.model.parameters())[7, 11] += frozen
    with pytest.raises(ValueError, match=f"^load_run: {text}"):
        trainer.load_run(tmp_path)


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    trainer = make()
    trainer.save_run(tmp_path)
    found = fingerprint(trainer)
    monkeypatch.setattr("ppo_ext.trainer.resume.fingerprint", lambda _: {**found, "the number of processes": 2})
    with pytest.raises(ValueError, match="load_run: the number of processes must be 1 as in .*, got 2"):
        trainer.load_run(tmp_path)


def test_what_changes_no_number_may_differ(tmp_path):
    saved = make(steps=10, tracker_project_name="first", seed=1)
    steps(saved)
    saved.save_run(tmp_path)
    loaded = make(steps=99, tracker_project_name="second", seed=2, exp_name="again")
    loaded.load_run(tmp_path)
    assert_unmoved(tiny_models.weights(saved), loaded)


SCHEDULES = {
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 3], gamma=0.5),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.MultiStepLR(optimizer, [1, 2])], [1]
    ),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=6),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, 2, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: np.float64(0.5) ** epoch),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on(tmp_path, name):
    def trainer():
        made = tiny_models.trainer(ppo_epochs=1, mini_batch_size=4, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
        made.lr_scheduler = made.accelerator.prepare(SCHEDULES[name](made.optimizer.optimizer))
        return made

    def rates(made, count):
        return [steps(made)[0]["ppo/learning_rate"] for _ in range(count)]

    whole, resumed = trainer(), trainer()
    rates(whole, 2)
    whole.save_run(tmp_path)
    resumed.load_run(tmp_path)
    expected = rates(whole, 3)
    assert rates(resumed, 3) == expected and len(set(expected)) > 1


def remembering(value):
    def change(trainer):
        trainer.lr_scheduler.scheduler.memory = value

    return change


def own_nan_rate(trainer):
    trainer.optimizer.param_groups[0]["lr"] = float("nan")


def own_casting(trainer):
    inner = trainer.optimizer.optimizer
    inner.state[inner.param_groups[0]["params"][0]]["exp_avg"] = torch.zeros(48, 24, dtype=torch.float64)


NOT_SAVED = {
    "a function": (
        remembering(print),
        "lr_scheduler.memory must be a number, .* got builtins.builtin_function_or_method",
    ),
    "a NaN": (remembering([1.0, float("nan")]), "lr_scheduler.memory.1 must be a number, .* got NaN"),
    "a set": (remembering({1, 2}), "lr_scheduler.memory must be a number, .* got builtins.set"),
    "a size": (remembering(torch.Size([2])), "lr_scheduler.memory must be a number, .* got torch.Size"),
    "a sparse tensor": (remembering(torch.eye(2).to_sparse()), "lr_scheduler.memory must be .* got torch.Tensor"),
    "a NaN rate": (own_nan_rate, "the learning rate of group 0 must be finite, got nan"),
    "a state that is cast": (
        own_casting,
        "optimizer.state.0.exp_avg must come back equal from the optimizer's load_state_dict",
    ),
    "an infinite moment": (lambda trainer: setattr(trainer.running, "std", float("inf")), "running.std must be finite"),
}


@pytest.mark.parametrize("case", NOT_SAVED)
def test_what_would_not_come_back_equal_is_not_saved(tmp_path, case):
    change, text = NOT_SAVED[case]
    trainer = make()
    steps(trainer)
    trainer.save_run(tmp_path)
    saved = (tmp_path / STATE_FILE).read_bytes()
    change(trainer)
    with pytest.raises(ValueError, match=f"^save_run: {text}"):
        trainer.save_run(tmp_path)
    assert (tmp_path / STATE_FILE).read_bytes() == saved and os.listdir(tmp_path) == [STATE_FILE]


def test_gradients_that_the_optimizer_does_not_hold_do_not_reach_the_next_step(tmp_path):
    def trainer():
        made = tiny_models.trainer(max_grad_norm=1e-3, optimizer=lambda p: torch.optim.SGD(list(p)[-2:], lr=1e-2))
        return made, tiny_models.spy_on_updates(made)

    (whole, expected), (resumed, got) = trainer(), trainer()
    steps(whole)
    whole.save_run(tmp_path)
    expected.clear()
    steps(whole)
    resumed.load_run(tmp_path)
    steps(resumed)
    assert got == expected


def test_an_update_that_was_begun_ends_with_load_run(tmp_path):
    """Such as one of a loop of one's own, of which `step` knows nothing."""
    trainer = make()
    steps(trainer)
    trainer.save_run(tmp_path)
    trainer.model.v_head.summary.weight.sum().backward()
    trainer.load_run(tmp_path)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_schedule_that_refuses_its_state_leaves_the_optimizer_as_it_was(tmp_path, monkeypatch):
    saved, trainer = make(), make()
    steps(saved, 2)
    saved.save_run(tmp_path)
    steps(trainer)
    before, weights = copy.deepcopy(trainer.optimizer.state_dict()), tiny_models.weights(trainer)
    calls, load = [], lr_scheduler.ExponentialLR.load_state_dict

    def refuse_first(schedule, state):
        calls.append(state)
        if len(calls) == 1:
            raise KeyError("gamma")
        return load(schedule, state)

    monkeypatch.setattr(lr_scheduler.ExponentialLR, "load_state_dict", refuse_first)
    with pytest.raises(ValueError, match="^load_run: lr_scheduler must take its state in .*, got 'gamma'"):
        trainer.load_run(tmp_path)
    assert difference(trainer.optimizer.state_dict(), before, "optimizer") is None
    assert_unmoved(weights, trainer)


def test_a_controller_of_ones_own_goes_on(tmp_path):
    class Integral(FixedKLController):
        total = 0.0

        def update(self, current, n_steps):
            self.total += float(current)
            self.value = 0.2 + 0.01 * self.total

    whole, resumed = make(), make()
    whole.kl_ctl, resumed.kl_ctl = Integral(0.2), Integral(0.2)
    steps(whole, 2)
    whole.save_run(tmp_path)
    resumed.load_run(tmp_path)
    assert vars(resumed.kl_ctl) == vars(whole.kl_ctl) and resumed.kl_ctl.total != 0
