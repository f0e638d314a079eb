"""A warning of the trainer names the line of the program that uses it, however it gets there."""

import linecache

import pytest
import tiny_models
import torch

from ppo_ext import PPOConfig, PPOTrainer

PADDED = [torch.tensor([5, 6, 7, 0, 0])] * 4


class Deeper(PPOTrainer):
    def step(self, *args):
        return super().step(*args)  # the line that calls this package


def line_of(caught):
    (warning,) = caught
    return linecache.getline(warning.filename, warning.lineno).strip()


@pytest.mark.parametrize("exact_update", [True, False])
def test_padding_in_a_batch(exact_update):
    trainer = tiny_models.trainer(exact_update=exact_update)
    queries, _, scores = tiny_models.batch(4, 1)
    with pytest.warns(UserWarning, match="are padding") as caught:
        trainer.step(queries, PADDED, scores)
    assert line_of(caught) == "trainer.step(queries, PADDED, scores)"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_skipped_minibatches(accumulation):
    trainer = tiny_models.trainer(ratio_threshold=1e-6, gradient_accumulation_steps=accumulation, ppo_epochs=1)
    with pytest.warns(UserWarning, match="skipped") as caught:
        trainer.step(*tiny_models.batch(4, 1))
    assert {line_of([warning]) for warning in caught} == {"trainer.step(*tiny_models.batch(4, 1))"}


def test_a_subclass_is_the_users():
    trainer = tiny_models.trainer(kind=Deeper)
    queries, _, scores = tiny_models.batch(4, 1)
    with pytest.warns(UserWarning, match="are padding") as caught:
        trainer.step(queries, PADDED, scores)
    assert line_of(caught).endswith("# the line that calls this package")


def test_deprecated_fields():
    with pytest.warns(FutureWarning, match="forward_batch_size") as caught:
        PPOConfig(forward_batch_size=2, batch_size=4)
    assert line_of(caught) == "PPOConfig(forward_batch_size=2, batch_size=4)"
