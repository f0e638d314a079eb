"""PPOConfig: TRL's fields and defaults, its checks; the KL controllers."""

import dataclasses
import pathlib
import warnings

import numpy as np
import pytest
import tiny_models
import yaml
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import GradScalerKwargs
from conftest import require_trl

import ppo_ext

OURS = {
    "bootstrap_truncated",
    "cliprange_high",
    "critic_learning_rate",
    "critic_warmup_steps",
    "dual_clip",
    "entropy_coef",
    "exact_update",
    "gae_through_padding",
    "inplace_logits_grad",
    "lam_returns",
    "loss_aggregation",
    "ragged_batches",
    "rollout_high",
    "rollout_kind",
    "rollout_level",
    "rollout_low",
    "total_ppo_epochs",
}  # the last is an attribute in TRL


def test_fields_and_defaults_are_those_of_trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = require_trl().PPOConfig()
    ours = ppo_ext.PPOConfig()
    their_fields = {field.name for field in dataclasses.fields(theirs)}
    assert {field.name for field in dataclasses.fields(ours)} - their_fields == OURS
    for name, expected in vars(theirs).items():
        assert getattr(ours, name) == expected, name
    assert set(ours.to_dict()) - OURS == set(theirs.to_dict()) - OURS


def test_derived_fields():
    config = ppo_ext.PPOConfig(
        steps=100, batch_size=12, mini_batch_size=2, gradient_accumulation_steps=3, backward_batch_size=99
    )
    assert (config.backward_batch_size, config.total_ppo_epochs) == (6, 9)


def test_older_spellings():
    with pytest.warns(FutureWarning, match="forward_batch_size is deprecated and overwrites mini_batch_size"):
        config = ppo_ext.PPOConfig(batch_size=8, forward_batch_size=4)
    assert config.mini_batch_size == 4
    assert ppo_ext.PPOConfig(optimize_cuda_cache=True).optimize_device_cache is True


@pytest.mark.parametrize("parse", ["transformers", "tyro"])
def test_command_lines(parse):
    arguments = [
        "--batch_size",
        "4",
        "--mini_batch_size",
        "2",
        "--tracker_kwargs",
        '{"wandb": {"name": "x"}}',
        "--max_grad_norm",
        "0.5",
    ]
    if parse == "transformers":
        from transformers import HfArgumentParser

        (config,) = HfArgumentParser(ppo_ext.PPOConfig).parse_args_into_dataclasses(arguments)
    else:
        config = pytest.importorskip("tyro").cli(ppo_ext.PPOConfig, args=arguments)
    assert (config.batch_size, config.max_grad_norm, config.tracker_kwargs) == (4, 0.5, {"wandb": {"name": "x"}})


@pytest.mark.parametrize(
    "fields, kind, text",
    [
        (
            {"batch_size": 128, "mini_batch_size": 24, "gradient_accumulation_steps": 2},
            ValueError,
            "batch_size must be a multiple of mini_batch_size * gradient_accumulation_steps, got 128 and 24 * 2 = 48",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"mini_batch_size": 2.0}, TypeError, "mini_batch_size must be an int, got 2.0 (float)"),
        ({"ppo_epochs": True}, TypeError, "ppo_epochs must be an int, got True (bool)"),
        ({"learning_rate": "1e-5"}, TypeError, "learning_rate must be a number, got '1e-5' (str)"),
        ({"learning_rate": -1e-5}, ValueError, "learning_rate must be finite and not negative, got -1e-05"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be finite and not negative, got nan"),
        ({"init_kl_coef": float("inf")}, ValueError, "init_kl_coef must be finite and not negative, got inf"),
        ({"gamma": 1.1}, ValueError, "gamma must lie in [0, 1], got 1.1"),
        ({"lam": -0.1}, ValueError, "lam must lie in [0, 1], got -0.1"),
        ({"lam_returns": 1.1}, ValueError, "lam_returns must be None or lie in [0, 1], got 1.1"),
        (
            {"bootstrap_truncated": True, "gae_through_padding": True},
            ValueError,
            "bootstrap_truncated must be False with gae_through_padding=True, got True",
        ),
        ({"entropy_coef": -0.1}, ValueError, "entropy_coef must be finite and not negative, got -0.1"),
        ({"cliprange": -0.2}, ValueError, "cliprange must be finite and not negative, got -0.2"),
        ({"cliprange_high": -0.2}, ValueError, "cliprange_high must be None or finite and not negative, got -0.2"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip must be None or larger than 1 and at most 1e30, got 1.0"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be positive or None, got 0.0"),
        ({"score_clip": -1}, ValueError, "score_clip must be positive or None, got -1"),
        ({"ratio_threshold": 0}, ValueError, "ratio_threshold must be positive, got 0"),
        ({"target": 0.0}, ValueError, "target must be positive when adap_kl_ctrl is on, got 0.0"),
        ({"horizon": 0}, ValueError, "horizon must be positive, got 0"),
        (
            {"tracker_kwargs": "{'wandb': 1}"},
            ValueError,
            "tracker_kwargs must be a dict or its JSON text, got \"{'wandb': 1}\": Expecting property name enclosed in "
            "double quotes: line 1 column 2 (char 1)",
        ),
        ({"project_kwargs": "[1]"}, TypeError, "project_kwargs must be a dict or its JSON text, got [1] (list)"),
        ({"accelerator_kwargs": 3}, TypeError, "accelerator_kwargs must be a dict or its JSON text, got 3 (int)"),
        (
            {"push_to_hub_if_best_kwargs": "true"},
            TypeError,
            "push_to_hub_if_best_kwargs must be a dict or its JSON text, got True (bool)",
        ),
        (
            {"horizon": 25.6},
            ValueError,
            "horizon must exceed 0.2 * batch_size * processes = 25.6 when adap_kl_ctrl is on "
            "(one step could make kl_coef 0 or negative), got 25.6",
        ),
        (
            {"batch_size": 2**16, "mini_batch_size": 1},
            ValueError,
            "horizon must exceed 0.2 * batch_size * processes = "
            "13107.2 when adap_kl_ctrl is on (one step could make kl_coef 0 or negative), got 10000.0",
        ),
        ({"whiten_rewards": "false"}, TypeError, "whiten_rewards must be True or False, got 'false' (str)"),
        ({"early_stopping": None}, TypeError, "early_stopping must be True or False, got None (NoneType)"),
        ({"use_score_scaling": 1}, TypeError, "use_score_scaling must be True or False, got 1 (int)"),
        ({"gradient_checkpointing": []}, TypeError, "gradient_checkpointing must be True or False, got [] (list)"),
        ({"optimize_cuda_cache": "no"}, TypeError, "optimize_device_cache must be True or False, got 'no' (str)"),
        ({"seed": "0"}, TypeError, "seed must be an int, got '0' (str)"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got 1.5 (float)"),
        ({"seed": -1}, ValueError, "seed must lie in [0, 2**32), numpy's range, got -1"),
        ({"seed": 2**32}, ValueError, "seed must lie in [0, 2**32), numpy's range, got 4294967296"),
        (
            {"kl_penalty": "k2"},
            ValueError,
            "kl_penalty must be one of kl, abs, mse, full, k3, low_var_kl, got 'k2'",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_rejects(fields, kind, text):
    with pytest.raises(kind) as error:
        ppo_ext.PPOConfig(**fields)
    assert str(error.value) == f"PPOConfig: {text}"
    config = ppo_ext.PPOConfig()
    for name, value in fields.items():
        setattr(config, name, value)
    if "optimize_cuda_cache" not in fields:  # read at construction only
        with pytest.raises(kind):
            config.check()


SWITCHES = [field.name for field in dataclasses.fields(ppo_ext.PPOConfig) if isinstance(field.default, bool)]


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_is_a_bool(name):
    for value in (True, np.False_):
        assert getattr(ppo_ext.PPOConfig(**{name: value}), name) == value
    with pytest.raises(TypeError, match=f"PPOConfig: {name} must be True or False, got 'True'"):
        ppo_ext.PPOConfig(**{name: "True"})


def test_a_huge_number_is_a_number():
    assert ppo_ext.PPOConfig(horizon=10**400).horizon == 10**400


def test_the_horizon_is_checked_for_all_processes():
    config = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=4, horizon=1.0, world_size=2)  # overwritten: 1 process
    config.world_size = 2  # as the trainer sets it
    with pytest.raises(ValueError, match=r"0.2 \* batch_size \* processes = 1.6 when adap_kl_ctrl is on .*, got 1.0"):
        config.check()
    config.adap_kl_ctrl = False
    config.check()


class StrictTracker(GeneralTracker):
    """Takes what tensorboard takes."""

    name, requires_logging_directory, tracker = "tensorboard", False, None

    @on_main_process
    def __init__(self):
        super().__init__()
        self.settings, self.logs = {}, []

    @on_main_process
    def store_init_configuration(self, values):
        assert all(type(value) in (bool, int, float, str, type(None)) for value in values.values()), values
        self.settings = yaml.safe_load(yaml.safe_dump(values))

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.logs.append(values)


@pytest.mark.parametrize("listed", [False, True])
def test_a_tracker_of_plain_values_takes_every_config(listed):
    tracker = StrictTracker()
    handlers = [GradScalerKwargs(init_scale=2.0)]
    tiny_models.trainer(
        log_with=[tracker] if listed else tracker, learning_rate=np.float32(0.25), seed=np.int64(3),
        early_stopping=np.False_, task_name=np.str_("words"), model_name=pathlib.Path("folder"), max_grad_norm=np.float64(2),
        accelerator_kwargs={"kwargs_handlers": handlers}, tracker_kwargs={"tensorboard": {"filename_suffix": ["a", 1]}},
    )  # fmt: skip
    kept = {
        name: tracker.settings[name] for name in ("learning_rate", "seed", "early_stopping", "task_name", "model_name")
    }
    assert kept == {
        "learning_rate": 0.25,
        "seed": 3,
        "early_stopping": False,
        "task_name": "words",
        "model_name": "folder",
    }
    assert tracker.settings["max_grad_norm"] == 2.0 and tracker.settings["score_clip"] is None
    assert tracker.settings["accelerator_kwargs/kwargs_handlers"] == str(handlers)
    assert tracker.settings["tracker_kwargs/tensorboard/filename_suffix"] == "['a', 1]"


def test_wandb_must_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match="log_with='wandb' needs wandb, which is not installed; run pip install wandb"
    ):
        ppo_ext.PPOConfig(log_with="wandb")


def test_fixed_kl_controller():
    controller = ppo_ext.FixedKLController(0.3)
    controller.update(100.0, 10)
    assert controller.value == 0.3


def test_adaptive_kl_controller_is_that_of_trl():
    from importlib import import_module

    require_trl()
    theirs = import_module("trl.trainer").AdaptiveKLController(0.2, 6.0, 10000)
    ours = ppo_ext.AdaptiveKLController(0.2, 6.0, 10000)
    for current in (0.0, 6.0, 7.0, 100.0, -3.0, 5.5):
        theirs.update(current, 256)
        ours.update(np.float32(current), 256)
        assert type(ours.value) is float and ours.value == pytest.approx(theirs.value, rel=1e-6)


def test_the_adaptive_kl_controller_never_leaves_the_positive_numbers():
    controller = ppo_ext.AdaptiveKLController(0.2, 6.0, 51.3)
    controller.update(0.0, 256)  # 0.2 * 256 = 51.2
    assert 0 < controller.value < 0.001
    for horizon in (51.2, 1.0):
        controller = ppo_ext.AdaptiveKLController(0.2, 6.0, horizon)
        with pytest.raises(ValueError, match=r"AdaptiveKLController: horizon must exceed 0.2 \* n_steps = 51.2, got"):
            controller.update(0.0, 256)
        assert controller.value == 0.2
