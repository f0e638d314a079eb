"""A step that is interrupted anywhere changes nothing for the next one: it is that of a new trainer in the same state."""

import functools
import sys

import numpy as np
import pytest
import tiny_models
import torch
from interruptions import count_lines, interrupted_at

from ppo_ext.models import value_head


def make(kind):
    options = {}
    if kind == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        options = {"name": "llama", "peft_config": config}
    if kind == "checkpointing":
        options = {"gradient_checkpointing": True}
    trainer = tiny_models.trainer(
        gradient_accumulation_steps=2, mini_batch_size=1, use_score_scaling=True, max_grad_norm=0.1, **options
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer.optimizer, gamma=0.9)
    trainer.lr_scheduler = trainer.accelerator.prepare(schedule)
    return trainer


def step(trainer, seed):
    return trainer.step(*tiny_models.batch(4, seed))


def next_step(trainer):
    """Everything that the next step gives: statistics, weights, KL coefficient, learning rate, random numbers."""
    stats = step(trainer, 6)
    kept = {key: value for key, value in stats.items() if not key.startswith("time/")}
    kept["kl_coef"], kept["lr"] = trainer.kl_ctl.value, trainer.optimizer.param_groups[0]["lr"]
    kept["drawn"], kept["skipped"] = (np.random.rand(), torch.rand(()).item()), trainer.skipped_minibatches
    return {**kept, **{name: weight.numpy() for name, weight in tiny_models.weights(trainer).items()}}


def assert_like_a_new_trainer(trainer, new, folder):
    trainer.save_run(folder)
    got = next_step(trainer)
    new.load_run(folder)
    expected = next_step(new)
    assert [key for key in expected if not np.array_equal(got[key], expected[key])] == []


@pytest.mark.parametrize("kind", ["gpt2", "lora", "checkpointing"])
def test_the_next_step_is_that_of_a_new_trainer(kind, tmp_path):
    lines = count_lines(functools.partial(step, make(kind), 5))
    trainer, new = make(kind), make(kind)
    for at in np.linspace(50, lines * 0.95, 6).astype(int):  # one after the other, in one trainer
        assert interrupted_at(at, functools.partial(step, trainer, 5)), at
    assert_like_a_new_trainer(trainer, new, tmp_path)


@pytest.mark.parametrize(
    "method", ["loss", "batched_forward_pass", "compute_rewards", "_early_stop", "record_step_stats"]
)
def test_after_an_error_of_a_replaced_method(method, tmp_path):
    trainer = make("gpt2")
    calls, original = [], getattr(trainer, method)

    def fail_at_the_second(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise ZeroDivisionError
        return original(*args, **kwargs)

    setattr(trainer, method, fail_at_the_second)
    with pytest.raises(ZeroDivisionError):
        for seed in (4, 5):
            step(trainer, seed)
    delattr(trainer, method)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert_like_a_new_trainer(trainer, make("gpt2"), tmp_path)


def test_after_a_second_interruption_while_the_first_is_cleared_up(tmp_path):
    trainer = make("lora")
    discard, loss = trainer._turn_adapters_on, trainer.loss

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    trainer.loss = trainer._turn_adapters_on = interrupted
    with pytest.raises(KeyboardInterrupt):
        step(trainer, 5)
    trainer.loss, trainer._turn_adapters_on = loss, discard
    for module in trainer.model.modules():
        if hasattr(module, "_disable_adapters"):
            module.enable_adapters(False)
    assert_like_a_new_trainer(trainer, make("lora"), tmp_path)


def test_a_half_created_optimizer_state_is_discarded(tmp_path):
    trainer, moments, zeros_like = make("gpt2"), [], torch.zeros_like

    def out_of_memory(*args, **kwargs):
        if sys._getframe(1).f_code.co_name == "_init_group":  # of torch's Adam
            moments.append(None)
        if len(moments) == 4:  # of the second parameter one moment is there
            raise torch.OutOfMemoryError
        return zeros_like(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "zeros_like", out_of_memory)
        step(trainer, 5)
    assert len(moments) == 4 and not trainer.optimizer.state
    assert_like_a_new_trainer(trainer, make("gpt2"), tmp_path)


def test_hooks_that_were_set_and_not_noted_are_removed():
    trainer = make("gpt2")
    module = trainer.model.pretrained_model.transformer

    def interrupted(*args, **kwargs):
        register(*args, **kwargs)
        raise KeyboardInterrupt

    register = module.register_forward_hook
    module.register_forward_hook = interrupted
    with pytest.raises(KeyboardInterrupt):
        step(trainer, 5)
    del module.register_forward_hook
    assert not any(
        isinstance(hook, value_head._Capture) for m in trainer.model.modules() for hook in m._forward_hooks.values()
    )


def test_the_minibatches_of_an_interrupted_update_have_no_vote_in_the_next():
    trainer = tiny_models.trainer(
        gradient_accumulation_steps=2, mini_batch_size=1, ppo_epochs=1, learning_rate=1e-6, ratio_threshold=1.2
    )
    loss, calls = trainer.loss, []

    def fail_at_the_second(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise ZeroDivisionError
        return loss(*args, **kwargs)

    trainer.loss = fail_at_the_second
    with pytest.raises(ZeroDivisionError):
        step(trainer, 5)
    trainer.loss = loss
    step(trainer, 5)  # all ratios are about 1; a third one would make their mean 1.5
    assert trainer.skipped_minibatches == 0


def test_an_accumulation_begins_with_the_step_after_the_config_has_changed():
    trainer = tiny_models.trainer(mini_batch_size=1, ppo_epochs=1)
    trainer.accelerator.step = 3  # as after three minibatches of a step of one's own
    trainer.config.gradient_accumulation_steps = 2
    norms = tiny_models.spy_on_updates(trainer)
    step(trainer, 5)
    assert len(norms) == 2 and trainer.accelerator.step == 4


def test_a_refused_batch_keeps_gradients_of_the_users_own():
    trainer = make("gpt2")
    trainer.model.v_head.summary.weight.sum().backward()
    with pytest.raises(ValueError, match="must be finite in float32"):
        trainer.step(*tiny_models.batch(4, 5)[:2], [float("nan")] * 4)
    assert trainer.model.v_head.summary.weight.grad is not None
