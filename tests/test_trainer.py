"""PPOTrainer's training: where it differs from TRL on purpose, and what its options do."""

import inspect
import math
import warnings

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import assert_unmoved, scalars, spy_on_updates, steps

import ppo_ext


def test_gradient_is_clipped_at_every_update():
    trainer = tiny_models.trainer(max_grad_norm=1e-3)
    norms = spy_on_updates(trainer)
    steps(trainer, 2)
    assert len(norms) == 8
    assert all(norm == pytest.approx(1e-3, rel=1e-2) for norm in norms), norms


@pytest.mark.parametrize("norm", [False, True])
def test_score_scaling(norm):
    trainer = tiny_models.trainer(use_score_scaling=True, use_score_norm=norm, score_clip=0.9)
    queries, responses, _ = tiny_models.batch(4, 1)
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    stats = trainer.step(queries, responses, list(scores))
    expected = ((scores - 2.5 * norm) / 1.2909944).clamp(-0.9, 0.9)
    assert stats["ppo/mean_scores"] == pytest.approx(expected.mean().item(), abs=1e-6)
    assert stats["ppo/std_scores"] == pytest.approx(expected.std().item(), abs=1e-6)


def test_left_padding_moves_no_position():
    right, left = (steps(tiny_models.trainer(padding_side=side, optimizer=sgd))[0] for side in ("right", "left"))
    assert scalars(left) == pytest.approx(scalars(right), rel=1e-3, abs=1e-5)
    columns = [stats["objective/logprobs"] for stats in (right, left)]
    for ours, expected in zip(*columns, strict=True):
        np.testing.assert_allclose(ours[ours != 0], expected[expected != 0], atol=2e-5)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-2)


def test_padding_behind_a_response_changes_nothing_with_whitened_rewards():
    def one_step(pad_to_multiple_of):
        trainer = tiny_models.trainer(whiten_rewards=True, optimizer=sgd)
        trainer.data_collator.pad_to_multiple_of = pad_to_multiple_of
        return steps(trainer)[0]

    plain, padded = one_step(None), one_step(32)
    assert padded["objective/logprobs"].shape == (4, 31)
    assert scalars(padded) == pytest.approx(scalars(plain), rel=1e-3, abs=1e-5)


def test_ratio_guard_skips_the_update_too():
    trainer = tiny_models.trainer()
    steps(trainer)  # Adam now has momentum
    before = tiny_models.weights(trainer)
    trainer.config.ratio_threshold = 0.5
    with pytest.warns(
        UserWarning, match=r"the mean ratio of a minibatch is 1.00, above ratio_threshold = 0.50; .* skipped"
    ):
        (stats,) = steps(trainer)
    assert_unmoved(before, trainer)
    assert trainer.skipped_minibatches == 4
    assert stats["ppo/loss/total"] == stats["ppo/loss/policy"] == stats["ppo/loss/value"] == 0
    assert stats["ppo/policy/ratio"][stats["ppo/policy/ratio"] != 0] == pytest.approx(1)
    assert len(stats) == 40


def test_ratio_guard_keeps_the_other_mini_batches_of_an_update():
    trainer = tiny_models.trainer(gradient_accumulation_steps=2, ppo_epochs=1, exact_update=False)
    norms = spy_on_updates(trainer)
    loss, calls = trainer.loss, []

    def skip_the_first(*args):
        trainer.config.ratio_threshold = 10.0 if calls else 0.5
        calls.append(None)
        return loss(*args)

    trainer.loss = skip_the_first
    with pytest.warns(UserWarning, match="skipped"):
        steps(trainer)
    assert trainer.skipped_minibatches == 1 and len(norms) == 1 and norms[0] > 0


def test_one_token_in_the_whole_batch_is_no_nan():
    trainer = tiny_models.trainer(batch_size=1, mini_batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = trainer.step([torch.tensor([5, 6])], [torch.tensor([7])], [1.0])
    assert all(np.isfinite(value).all() for value in stats.values()), stats
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert stats["ppo/std_scores"] == stats["tokens/responses_len_std"] == 0


def test_accumulation_goes_on_in_the_last_batch_of_a_dataloader():
    model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2"))
    config = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=1, gradient_accumulation_steps=2, ppo_epochs=1)
    dataset = torch.utils.data.TensorDataset(torch.arange(8))
    trainer = ppo_ext.PPOTrainer(config, model, None, tiny_models.tokenizer(), dataset=dataset)
    norms = spy_on_updates(trainer)
    for _ in trainer.dataloader:
        steps(trainer)
    assert len(norms) == 4


def test_kl_coefficient_stays_a_float():
    trainer = tiny_models.trainer()
    steps(trainer)
    assert type(trainer.kl_ctl.value) is float and trainer.kl_ctl.value != 0.2


def test_ratio_is_one_before_the_first_update():
    (stats,) = steps(tiny_models.trainer(learning_rate=0.0))
    ratio = stats["ppo/policy/ratio"]
    assert ratio[ratio != 0] == pytest.approx(1, abs=1e-6)  # scored and trained in chunks of different widths


def test_early_stopping_ends_the_epochs():
    (stats,) = steps(tiny_models.trainer(ppo_epochs=4, early_stopping=True, target_kl=1e-9))
    tokens_per_epoch = stats["objective/logprobs"].size
    assert stats["ppo/policy/ratio"].size < 4 * tokens_per_epoch


def test_gradient_checkpointing_recomputes_and_changes_no_number():
    counts, results = [], []
    for checkpointing in (False, True):
        trainer = tiny_models.trainer("llama", gradient_checkpointing=checkpointing, optimizer=sgd)
        calls = []
        layer = trainer.model.pretrained_model.model.layers[0].mlp
        # a pre-hook: a recomputation stops before the end of the forward, so a forward hook would not run
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        results.append(scalars(steps(trainer)[0]))
        counts.append(len(calls))
    measured, rollout, training = 2, 2, 4  # passes over a few tokens, before the first step; minibatches
    assert counts == [measured + rollout + training, measured + rollout + 2 * training]
    assert results[1] == pytest.approx(results[0], rel=1e-5, abs=1e-7)


def test_bfloat16_logits_are_not_copied_to_float32():
    trainer = tiny_models.trainer("llama")
    trainer.model.pretrained_model.to(torch.bfloat16)
    trainer.ref_model.pretrained_model.to(torch.bfloat16)
    queries, responses, _ = tiny_models.batch(2, 1)
    inputs = trainer.prepare_model_inputs(queries, responses)
    logprobs, logits, _, _ = trainer.batched_forward_pass(trainer.model, queries, responses, inputs, return_logits=True)
    assert (logits.dtype, logprobs.dtype) == (torch.bfloat16, torch.float32)
    stats = steps(trainer)[0]
    assert all(np.isfinite(value).all() for value in stats.values())


@pytest.fixture
def fresh_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # mixed precision is fixed once per process
    yield
    AcceleratorState._reset_state(True)


def test_mixed_precision_leaves_logits_in_half_precision(fresh_accelerate):
    trainer = tiny_models.trainer("llama", accelerator_kwargs={"mixed_precision": "bf16", "cpu": True})
    queries, responses, _ = tiny_models.batch(2, 1)
    inputs = trainer.prepare_model_inputs(queries, responses)
    for model in (trainer.model, trainer.ref_model):
        _, logits, values, _ = trainer.batched_forward_pass(model, queries, responses, inputs, return_logits=True)
        assert (logits.dtype, values.dtype) == (torch.bfloat16, torch.float32)
    half = steps(trainer)[0]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False) is trainer.model
    assert all(np.isfinite(value).all() for value in half.values())


def test_config_fields_may_change_between_steps():
    trainer = tiny_models.trainer()
    steps(trainer)
    trainer.config.gradient_accumulation_steps = 2
    norms = spy_on_updates(trainer)
    steps(trainer)
    assert len(norms) == 2 and trainer.config.backward_batch_size == 4
    trainer.config.mini_batch_size = 3
    before = tiny_models.weights(trainer)
    with pytest.raises(ValueError, match="got 4 and 3 . 2 = 6"):
        steps(trainer)
    assert_unmoved(before, trainer)


def test_shared_layers_stay_frozen():
    model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2"))
    config = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-2)
    trainer = ppo_ext.PPOTrainer(config, model, None, tiny_models.tokenizer(), num_shared_layers=1)
    before = tiny_models.weights(trainer)
    steps(trainer)
    moved = {
        name for name, parameter in tiny_models.weights(trainer).items() if not torch.equal(parameter, before[name])
    }
    assert not any("transformer.h.0" in name or "wte" in name for name in moved)
    assert any("transformer.h.1" in name for name in moved)


def test_training_raises_the_score():
    trainer = tiny_models.trainer(batch_size=16, mini_batch_size=8, learning_rate=5e-3, init_kl_coef=0.01, ppo_epochs=4)
    queries = [torch.tensor([5, 6])] * 16
    means = []
    for _ in range(8):
        responses = trainer.generate(
            queries,
            return_prompt=False,
            batch_size=16,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            min_new_tokens=6,
            max_new_tokens=6,
            pad_token_id=0,
        )
        scores = [(ids < 20).float().mean() for ids in responses]
        trainer.step(queries, responses, scores)
        means.append(torch.stack(scores).mean().item())
    assert means[-1] > means[0] + 0.2, means
    assert all(math.isfinite(mean) for mean in means)


def test_step_stays_short_enough_to_read():
    assert len(inspect.getsource(ppo_ext.PPOTrainer.step).splitlines()) <= 45
