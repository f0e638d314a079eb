"""PPOConfig: TRL's fields and defaults, its checks; the KL controllers."""

import dataclasses
import warnings

import numpy as np
import pytest
from conftest import require_trl

import ppo_ext

OURS = {"gae_through_padding", "inplace_logits_grad", "total_ppo_epochs"}  # the last is an attribute in TRL


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
        ({"cliprange": -0.2}, ValueError, "cliprange must be finite and not negative, got -0.2"),
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
        ({"kl_penalty": "k3"}, ValueError, "kl_penalty must be one of kl, abs, mse, full, got 'k3'"),
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
    with pytest.raises(kind):
        config.check()


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
