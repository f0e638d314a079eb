"""What the trainer hands to DeepSpeed, which the test environment does not have: a stand-in with its manners."""

import sys
import types

import pytest
import torch

from ppo_ext.trainer import acceleration


class Engine(torch.nn.Module):
    """As DeepSpeed's, it returns nothing from train() and eval()."""

    def __init__(self, model, config):
        super().__init__()
        self.module, self.given = model, config

    def train(self, mode=True):
        super().train(mode)


def accelerator(stage, distributed_type="DEEPSPEED"):
    config = {"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}
    plugin = types.SimpleNamespace(deepspeed_config=config)
    return types.SimpleNamespace(
        state=types.SimpleNamespace(deepspeed_plugin=plugin), distributed_type=distributed_type
    )


@pytest.mark.parametrize("stage, expected", [(1, 0), (2, 0), (3, 3)])
def test_the_reference_is_an_engine_in_eval_mode(stage, expected, monkeypatch):
    stand_in = types.ModuleType("deepspeed")
    stand_in.initialize = lambda model, config: (Engine(model, config), None, None, None)
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    model, given = torch.nn.Linear(2, 2), accelerator(stage)
    engine = acceleration.deepspeed_engine(given, model)
    assert engine.module is model and not model.training
    assert engine.given["zero_optimization"]["stage"] == expected
    assert given.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("max_grad_norm, expected", [(None, 1.0), (0.5, 0.5)])
def test_deepspeed_clips_at_max_grad_norm(max_grad_norm, expected):
    given = accelerator(2)
    acceleration.clip_in_deepspeed(given, max_grad_norm)
    assert given.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] == expected


def test_a_plugin_that_is_not_in_use_is_left_alone():
    given = accelerator(2, distributed_type="MULTI_GPU")
    acceleration.clip_in_deepspeed(given, 0.5)
    assert given.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] == 1.0
