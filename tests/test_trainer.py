"""PPOTrainer's own behaviour: what TRL gets wrong, what subclasses rely on, and what a step leaves behind."""

import math
import warnings
import weakref

import numpy as np
import pytest
import tiny_models
import torch

import ppo_ext
from ppo_ext.trainer.stats import RunningMoments

PER_TOKEN = ("objective/logprobs", "objective/ref_logprobs", "ppo/policy/advantages", "ppo/policy/ratio")


def steps(trainer, count=1, **options):
    return [trainer.step(*tiny_models.batch(trainer.config.batch_size, 20 + i, **options)) for i in range(count)]


def scalars(stats):
    return {key: value for key, value in stats.items() if isinstance(value, float) and not key.startswith("time/")}


def assert_unmoved(before, trainer):
    for name, parameter in tiny_models.weights(trainer).items():
        assert torch.equal(parameter, before[name]), name


def spy_on_updates(trainer):
    """The gradient's norm at every optimizer update."""
    norms, step = [], trainer.optimizer.step

    def counted(*args, **kwargs):
        if trainer.accelerator.sync_gradients:
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())
        return step(*args, **kwargs)

    trainer.optimizer.step = counted
    return norms


# ---- what TRL gets wrong -------------------------------------------------------------------------------------------


def test_gradient_is_clipped_at_every_update():
    trainer = tiny_models.trainer(max_grad_norm=1e-3)
    norms = spy_on_updates(trainer)
    steps(trainer, 2)
    assert len(norms) == 8
    assert all(norm == pytest.approx(1e-3, rel=1e-2) for norm in norms), norms


def test_running_moments_have_the_numbers_of_trl_0_9():
    moments = RunningMoments(tiny_models.trainer().accelerator)
    mean, std = moments.update(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (mean, std) == (2.5, pytest.approx(1.2909944)) and moments.std == pytest.approx(1.2909944)
    moments.update(torch.tensor([5.0, 6.0]))
    assert (moments.mean, moments.count) == (3.5, 6)
    assert moments.std == pytest.approx(1.8708287) and moments.var == pytest.approx(2.9166667)


def test_running_moments_of_one_score_are_finite():
    moments = RunningMoments(tiny_models.trainer().accelerator)
    assert moments.update(torch.tensor([3.0])) == (3.0, 0.0)
    assert (moments.mean, moments.std) == (3.0, 1.0)


def test_running_moments_survive_a_file(tmp_path):
    accelerator = tiny_models.trainer().accelerator
    moments = RunningMoments(accelerator)
    moments.update(torch.tensor([1.0, 2.0, 4.0]))
    moments.save_to_json(tmp_path / "moments.json")
    assert RunningMoments.load_from_json(accelerator, tmp_path / "moments.json") == moments


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
        UserWarning, match=r"the mean ratio of a mini batch is 1.00, above ratio_threshold = 0.50; .* skipped"
    ):
        (stats,) = steps(trainer)
    assert_unmoved(before, trainer)
    assert trainer.skipped_minibatches == 4
    assert stats["ppo/loss/total"] == stats["ppo/loss/policy"] == stats["ppo/loss/value"] == 0
    assert stats["ppo/policy/ratio"][stats["ppo/policy/ratio"] != 0] == pytest.approx(1)
    assert len(stats) == 40


def test_ratio_guard_keeps_the_other_mini_batches_of_an_update():
    trainer = tiny_models.trainer(gradient_accumulation_steps=2, ppo_epochs=1)
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


def test_generation_runs_without_dropout():
    trainer = tiny_models.trainer(changes={"attn_pdrop": 0.5, "resid_pdrop": 0.5})
    trainer.model.train()
    queries, _, _ = tiny_models.batch(4, 1)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    first, second = (trainer.generate(queries, batch_size=4, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert trainer.model.training, "the mode the user had set comes back"
    steps(trainer)
    assert not trainer.model.training


def test_end_of_sequence_in_the_query_cuts_nothing():
    trainer = tiny_models.trainer()
    query = torch.tensor([5, tiny_models.EOS, 6, 7])
    (whole,) = trainer.generate([query], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(whole[:4], query) and len(whole) == 7


def test_generation_cuts_after_the_first_end_of_sequence():
    trainer = tiny_models.trainer()
    eos = tiny_models.EOS
    rows = torch.tensor([[0, 5, 6, 9, eos, 3, eos], [4, 5, 6, 9, 8, 7, 3]])
    queries = [torch.tensor([5, 6]), torch.tensor([4, 5, 6])]

    def trim(*options):
        return [row.tolist() for row in trainer._trim(rows, queries, 3, *options)]

    assert trim(False, True) == [[9, eos], [9, 8, 7, 3]]
    assert trim(True, True) == [[5, 6, 9, eos], [4, 5, 6, 9, 8, 7, 3]]
    assert trim(False, False) == [[9, eos, 3, eos], [9, 8, 7, 3]]
    with pytest.raises(
        ValueError, match=r"PPOTrainer.generate: query_tensor must be a 1-D tensor .*, got shape \[1, 2\]"
    ):
        trainer.generate(torch.ones(1, 2, dtype=torch.int64))


def test_reference_responses_of_a_lora_policy_come_without_the_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = tiny_models.trainer("llama", peft_config=config)
    queries, _, _ = tiny_models.batch(4, 1)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "batch_size": 4}
    policy, reference = trainer.generate(queries, generate_ref_response=True, **options)
    assert any(not torch.equal(a, b) for a, b in zip(policy, reference, strict=True))
    with trainer.model.pretrained_model.disable_adapter():
        without = trainer.generate(queries, **options)
    assert all(torch.equal(a, b) for a, b in zip(reference, without, strict=True))


def test_kl_coefficient_stays_a_float():
    trainer = tiny_models.trainer()
    steps(trainer)
    assert type(trainer.kl_ctl.value) is float and trainer.kl_ctl.value != 0.2


# ---- what subclasses and callers rely on ---------------------------------------------------------------------------


def test_an_overridden_penalty_is_used():
    class Doubled(ppo_ext.PPOTrainer):
        def _kl_penalty(self, logprob, ref_logprob):
            return 2 * (logprob - ref_logprob)

    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -2.0, -1.0]])
    arguments = torch.tensor([1.0]), logprobs, ref_logprobs, torch.tensor([[1, 1, 0]])
    plain, doubled = (tiny_models.trainer(kind=kind).compute_rewards(*arguments) for kind in (None, Doubled))
    torch.testing.assert_close(plain[2], torch.tensor([[0.5, 0.0, 0.0]]))
    torch.testing.assert_close(doubled[2], torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(doubled[0], torch.tensor([[-0.2, 1.0, 0.0]]))


@pytest.mark.parametrize(
    "kl_penalty, expected", [("kl", [0.5, 0.0, -2.0]), ("abs", [0.5, 0.0, 2.0]), ("mse", [0.125, 0.0, 2.0])]
)
def test_penalty_of_one_row(kl_penalty, expected):
    trainer = tiny_models.trainer(kl_penalty=kl_penalty)
    got = trainer._kl_penalty(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -1.0]))
    torch.testing.assert_close(got, torch.tensor(expected))


def test_full_penalty_takes_whole_distributions_too():
    trainer = tiny_models.trainer(kl_penalty="full")
    logits, ref_logits = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    kls = trainer.compute_rewards(torch.zeros(2), logprobs, ref_logprobs, torch.ones(2, 3))[2]
    expected = (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)
    torch.testing.assert_close(kls, expected)
    torch.testing.assert_close(trainer._kl_penalty(logprobs[0], ref_logprobs[0]), expected[0])


def test_full_penalty_holds_the_logits_of_one_mini_batch(monkeypatch):
    from ppo_ext.trainer import forward

    seen, op = [], forward.full_kl
    monkeypatch.setattr(
        forward, "full_kl", lambda logits, *args, **kw: seen.append(len(logits)) or op(logits, *args, **kw)
    )
    steps(tiny_models.trainer(kl_penalty="full"))
    assert seen == [2, 2]


def test_the_loss_gets_a_view_of_the_logits_and_no_copy():
    trainer = tiny_models.trainer()
    queries, responses, _ = tiny_models.batch(2, 1)
    inputs = trainer.prepare_model_inputs(queries, responses)
    logprobs, logits, values, mask = trainer.batched_forward_pass(
        trainer.model, queries, responses, inputs, return_logits=True
    )
    width = inputs["input_ids"].shape[1]
    assert logits._base is not None and logits.shape == (2, width - 1, tiny_models.VOCAB)
    assert logprobs.shape == values.shape == mask.shape == (2, width - 1) and mask.dtype == torch.int64
    assert logits.untyped_storage().nbytes() == 2 * width * tiny_models.VOCAB * 4


def test_loss_called_by_hand_finds_the_entropy_itself():
    trainer = tiny_models.trainer()
    queries, responses, _ = tiny_models.batch(2, 1)
    inputs = trainer.prepare_model_inputs(queries, responses)
    logprobs, logits, values, mask = trainer.batched_forward_pass(
        trainer.model, queries, responses, inputs, return_logits=True
    )
    rest = (torch.randn_like(values), torch.randn_like(values))
    known = trainer.loss(logprobs.detach(), values.detach(), logits, values, logprobs, mask, *rest)
    other = trainer.loss(logprobs.detach(), values.detach(), logits, values, logprobs.clone(), mask, *rest)
    torch.testing.assert_close(known[2]["policy/entropy"], other[2]["policy/entropy"])
    expected = torch.distributions.Categorical(logits=logits).entropy()[mask != 0].mean()
    torch.testing.assert_close(known[2]["policy/entropy"], expected.detach())


def test_the_two_losses_have_gradients_of_their_own():
    trainer = tiny_models.trainer()
    old, new, values, vpreds, advantages, returns = torch.randn(6, 2, 5).unbind()
    new, vpreds = (old + 0.1 * new).requires_grad_(), vpreds.clone().requires_grad_()
    logits, mask = torch.randn(2, 5, 7), torch.ones(2, 5, dtype=torch.int64)
    pg_loss, vf_loss, stats = trainer.loss(old, values, logits, vpreds, new, mask, advantages, returns)
    torch.testing.assert_close((pg_loss + vf_loss).detach(), stats["loss/total"])
    grads = torch.autograd.grad(3 * pg_loss, (new, vpreds), retain_graph=True, allow_unused=True)
    whole = torch.autograd.grad(pg_loss + vf_loss, (new, vpreds))
    assert grads[1] is None
    torch.testing.assert_close(grads[0], 3 * whole[0])


def test_an_entropy_bonus_in_a_subclass_reads_the_logits():
    class WithBonus(ppo_ext.PPOTrainer):
        def loss(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns):
            policy, value, stats = super().loss(
                old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
            )
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            return policy - 0.5 * entropy[mask != 0].mean(), value, stats

    plain, bonus = (steps(tiny_models.trainer(kind=kind), 3)[-1]["ppo/policy/entropy"] for kind in (None, WithBonus))
    assert bonus > plain + 0.01


def test_a_subclass_may_read_the_logits_after_the_backward_pass():
    class Reads(ppo_ext.PPOTrainer):
        def train_minibatch(self, old_logprobs, values, logprobs, logits, *rest):
            before = logits.detach().clone()
            stats = super().train_minibatch(old_logprobs, values, logprobs, logits, *rest)
            assert torch.equal(logits.detach(), before)
            return stats

    steps(tiny_models.trainer(kind=Reads))


def test_the_backward_pass_lets_go_of_the_logits_before_it_reaches_the_layers():
    trainer = tiny_models.trainer()
    backbone, logits, held = trainer.model.pretrained_model, [], []
    backbone.register_forward_hook(lambda module, inputs, output: logits.append(weakref.ref(output.logits)))
    backbone.transformer.h[1].register_full_backward_hook(lambda *_: held.append(logits[-1]() is not None))
    steps(trainer)
    assert held == [False] * 4


@pytest.mark.parametrize("name, position", [("loss", 2), ("train_minibatch", 3)])
def test_a_method_set_on_the_trainer_gets_the_logits_and_may_read_them_later(name, position):
    trainer = tiny_models.trainer()
    own, seen = getattr(trainer, name), []

    def replaced(*arguments):
        seen.append((arguments[position], arguments[position].detach().clone()))
        return own(*arguments)

    setattr(trainer, name, replaced)
    steps(trainer)
    assert len(seen) == 4
    assert all(torch.equal(logits.detach(), before) for logits, before in seen)


def test_a_forward_pass_of_a_subclass_is_asked_for_the_logits():
    class Scores(ppo_ext.PPOTrainer):
        def batched_forward_pass(self, *arguments, **options):
            logprobs, logits, values, mask = super().batched_forward_pass(*arguments, **options)
            return logprobs.clone(), logits, values, mask  # whose entropy the loss then has to take from the logits

    plain, ours = (steps(tiny_models.trainer(kind=kind))[0] for kind in (None, Scores))
    assert scalars(ours) == pytest.approx(scalars(plain), rel=1e-5, abs=1e-7)


def test_overwriting_the_logits_changes_no_number():
    kept, overwritten = (steps(tiny_models.trainer(inplace_logits_grad=flag), 2) for flag in (False, True))
    assert [scalars(stats) for stats in kept] == [scalars(stats) for stats in overwritten]


def test_ratio_is_one_before_the_first_update():
    (stats,) = steps(tiny_models.trainer(learning_rate=0.0))
    ratio = stats["ppo/policy/ratio"]
    assert (ratio[ratio != 0] == 1).all()


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
        # before the forward, since recomputing stops before it ends
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        results.append(scalars(steps(trainer)[0]))
        counts.append(len(calls))
    scoring, training = 2, 4  # mini batches
    assert counts == [scoring + training, scoring + 2 * training]
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


# ---- what a step leaves behind -------------------------------------------------------------------------------------


def test_log_stats_reaches_any_tracker():
    from accelerate.tracking import GeneralTracker

    class Kept(GeneralTracker):
        name, requires_logging_directory = "kept", False

        def __init__(self):
            super().__init__()
            self.config, self.rows = None, []

        @property
        def tracker(self):
            return self.rows

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **kwargs):
            self.rows.append(values)

    kept = Kept()
    trainer = tiny_models.trainer(log_with=kept)
    (stats,) = steps(trainer)
    trainer.log_stats(
        stats, {"query": ["a"] * 4, "response": ["b"] * 4}, [1, 2.0, torch.tensor(3.0), torch.tensor([6])]
    )
    assert kept.config["trl_ppo_trainer_config"]["batch_size"] == 4
    (row,) = kept.rows
    assert row["env/reward_mean"] == 3 and row["env/reward_std"] == pytest.approx(2.1602469)
    assert row["env/reward_dist"].tolist() == [1, 2, 3, 6] and row["objective/kl"] == stats["objective/kl"]


def test_a_very_negative_kl_is_named():
    trainer = tiny_models.trainer()
    queries, _, scores = tiny_models.batch(4, 1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_prompt": False}
    _, responses = trainer.generate(queries, generate_ref_response=True, **options)
    trainer.model.pretrained_model.lm_head.weight.data.zero_()  # uniform, so the reference's favourites surprise it
    with pytest.warns(UserWarning, match=r"the KL per sequence is -\d.*, below -1. .* sample with top_k=0"):
        stats = trainer.step(queries, responses, scores)
    assert stats["objective/kl"] < -1


def test_save_pretrained(tmp_path):
    trainer = tiny_models.trainer()
    steps(trainer)
    trainer.save_pretrained(tmp_path / "run")
    loaded = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "run")
    for name, parameter in tiny_models.weights(trainer).items():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert "ppo_ext" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "tokenizer.json").exists()


def test_the_best_model_is_pushed():
    trainer = tiny_models.trainer(push_to_hub_if_best_kwargs={"repo_id": "me/mine"}, compare_steps=2)
    pushed = []
    trainer.push_to_hub = lambda **options: pushed.append((options, trainer.highest_reward.item()))
    queries, responses, _ = tiny_models.batch(4, 1)
    for score in (1.0, 9.0, 0.5, 9.0, 2.0):  # every second is looked at
        trainer.step(queries, responses, [score] * 4)
    assert pushed == [({"repo_id": "me/mine"}, 1.0), ({"repo_id": "me/mine"}, 2.0)]
    with pytest.raises(ValueError, match="push_to_hub_if_best_kwargs must have a repo_id, got .'private'."):
        tiny_models.trainer(push_to_hub_if_best_kwargs={"private": True})


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


def test_unused_columns_of_a_dataset_are_dropped():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"input_ids": [[3, 4]] * 4, "query": ["a"] * 4, "other": [1] * 4})
    trainer = tiny_models.trainer()

    def collate(samples):
        return samples

    assert set(next(iter(trainer.prepare_dataloader(dataset, collate)))[0]) == {"input_ids", "query"}
    trainer.config.remove_unused_columns = False
    assert set(next(iter(trainer.prepare_dataloader(dataset, collate)))[0]) == {"input_ids", "query", "other"}


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
