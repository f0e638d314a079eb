"""What programs rely on that replace methods of PPOTrainer: by a subclass, on an instance, or on the class itself."""

import numpy as np
import pytest
import tiny_models
import torch
from conftest import require_trl
from tiny_models import scalars, steps
from torch.nn.modules import module as torch_module

import ppo_ext.trl
from ppo_ext.trainer import chunks
from ppo_ext.trainer.overrides import is_overridden

WAYS = ("subclass", "instance", "class")


def trainer_with(monkeypatch, way, name, replacement, **config):
    """A trainer whose method is `replacement(trainer, shipped method, *arguments, **options)`."""
    shipped = getattr(ppo_ext.PPOTrainer, name)

    def method(self, *arguments, **options):
        return replacement(self, shipped, *arguments, **options)

    if way == "subclass":
        return tiny_models.trainer(kind=type("Replaced", (ppo_ext.PPOTrainer,), {name: method}), **config)
    if way == "class":
        monkeypatch.setattr(ppo_ext.PPOTrainer, name, method)
        return tiny_models.trainer(**config)
    trainer = tiny_models.trainer(**config)
    setattr(trainer, name, method.__get__(trainer))
    return trainer


# ---- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_replaced_method_is_seen(monkeypatch, way):
    names = ("batched_forward_pass", "_forward_pass", "train_minibatch", "loss", "compute_rewards", "_kl_penalty")
    assert not is_overridden(tiny_models.trainer(), *names)
    trainer = trainer_with(monkeypatch, way, "loss", lambda self, shipped, *arguments: shipped(self, *arguments))
    assert is_overridden(trainer, *names) and is_overridden(trainer, "loss")
    assert not is_overridden(trainer, "_kl_penalty", "train_minibatch")


def test_what_is_not_a_method_of_the_trainer_is_seen():
    trainer, other = tiny_models.trainer(), tiny_models.trainer()
    trainer.loss = other.loss
    assert is_overridden(trainer, "loss")
    trainer.loss = ppo_ext.PPOTrainer.loss.__get__(trainer)
    assert not is_overridden(trainer, "loss")
    trainer.loss = lambda *arguments: None
    assert is_overridden(trainer, "loss")


# ---- logits --------------------------------------------------------------------------------------------------------


class Keeper:
    """Keeps logits that are trained on, and what they were when it saw them."""

    def __init__(self):
        self.kept = []

    def see(self, logits):
        if logits is not None and logits.requires_grad:
            self.kept.append((logits, logits.detach().clone()))

    def hook(self, module, inputs, output):
        self.see(output if isinstance(output, torch.Tensor) else output[0])

    def assert_unchanged(self):
        assert len(self.kept) == 4  # one for each minibatch
        assert all(torch.equal(logits.detach(), before) for logits, before in self.kept)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["batched_forward_pass", "_forward_pass"])
def test_a_replaced_forward_pass_may_keep_its_logits(monkeypatch, way, name):
    keeper = Keeper()

    def replacement(self, shipped, *arguments, **options):
        results = shipped(self, *arguments, **options)
        keeper.see(results[1])
        return results

    steps(trainer_with(monkeypatch, way, name, replacement))
    keeper.assert_unchanged()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name, position", [("loss", 2), ("train_minibatch", 3)])
def test_a_replaced_loss_gets_the_logits_and_may_keep_them(monkeypatch, way, name, position):
    keeper = Keeper()

    def replacement(self, shipped, *arguments):
        keeper.see(arguments[position])
        return shipped(self, *arguments)

    steps(trainer_with(monkeypatch, way, name, replacement))
    keeper.assert_unchanged()


@pytest.mark.parametrize("hooked", ["wrapper", "language model", "head", "every module"])
def test_a_forward_hook_may_keep_the_logits(hooked):
    trainer, keeper = tiny_models.trainer(), Keeper()
    model, language_model = trainer.model, trainer.model.pretrained_model
    if hooked == "every module":
        handle = torch_module.register_module_forward_hook(
            lambda module, inputs, output: keeper.see(output[0]) if module is model else None
        )
    else:
        module = {"wrapper": model, "language model": language_model, "head": language_model.lm_head}[hooked]
        handle = module.register_forward_hook(keeper.hook)
    try:
        steps(trainer)
    finally:
        handle.remove()
    keeper.assert_unchanged()


def overwriting(monkeypatch, trainer):
    """Whether each training minibatch of a step lets its logits be overwritten."""
    flags, op = [], chunks.logprobs_and_entropy

    def spy(*arguments, inplace_backward, **options):
        flags.append(inplace_backward)
        return op(*arguments, inplace_backward=inplace_backward, **options)

    monkeypatch.setattr(chunks, "logprobs_and_entropy", spy)
    steps(trainer)
    return flags


def test_logits_are_overwritten_where_nobody_sees_them(monkeypatch):
    for flag in (True, False):
        trainer = tiny_models.trainer(inplace_logits_grad=flag, kl_penalty="full")  # which makes logits
        assert overwriting(monkeypatch, trainer) == [flag] * 4


def test_hooks_that_do_not_see_or_keep_the_logits_do_not_matter(monkeypatch):
    # gradient checkpointing hooks the embeddings; the penalty makes logits
    trainer = tiny_models.trainer("llama", gradient_checkpointing=True, kl_penalty="full")
    language_model = trainer.model.pretrained_model
    language_model.model.layers[1].register_forward_hook(lambda *_: None)

    def of_fsdp(module, inputs, output):
        pass

    of_fsdp.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    language_model.register_forward_hook(of_fsdp)
    assert overwriting(monkeypatch, trainer) == [True] * 4


def test_overwriting_the_logits_changes_no_number():
    options = {"kl_penalty": "full"}
    kept, overwritten = (steps(tiny_models.trainer(inplace_logits_grad=flag, **options), 2) for flag in (False, True))
    assert [scalars(stats) for stats in kept] == [scalars(stats) for stats in overwritten]


def test_a_caller_may_keep_the_logits():
    trainer = tiny_models.trainer()
    queries, responses, _ = tiny_models.batch(2, 1)
    inputs = trainer.prepare_model_inputs(queries, responses)
    logprobs, logits, *_ = trainer.batched_forward_pass(trainer.model, queries, responses, inputs, return_logits=True)
    before = logits.detach().clone()
    logprobs.sum().backward()
    assert torch.equal(logits.detach(), before)


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


def test_a_forward_pass_of_a_subclass_is_asked_for_the_logits():
    class Scores(ppo_ext.PPOTrainer):
        def batched_forward_pass(self, *arguments, **options):
            logprobs, logits, values, mask = super().batched_forward_pass(*arguments, **options)
            return logprobs.clone(), logits, values, mask  # whose entropy the loss then has to take from the logits

    plain, ours = (steps(tiny_models.trainer(kind=kind))[0] for kind in (None, Scores))
    assert scalars(ours) == pytest.approx(scalars(plain), rel=1e-5, abs=1e-7)


# ---- the penalty ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_replaced_penalty_is_used(monkeypatch, way):
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -2.0, -1.0]])
    arguments = torch.tensor([1.0]), logprobs, ref_logprobs, torch.tensor([[1, 1, 0]])
    plain = tiny_models.trainer().compute_rewards(*arguments)
    trainer = trainer_with(monkeypatch, way, "_kl_penalty", lambda self, shipped, *rows: 2 * shipped(self, *rows))
    doubled = trainer.compute_rewards(*arguments)
    torch.testing.assert_close(plain[2], torch.tensor([[0.5, 0.0, 0.0]]))
    torch.testing.assert_close(doubled[2], torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(doubled[0], torch.tensor([[-0.2, 1.0, 0.0]]))


@pytest.mark.parametrize("name, dims", [("compute_rewards", 3), ("_kl_penalty", 2)])
def test_replaced_methods_get_whole_distributions_for_the_full_penalty(monkeypatch, name, dims):
    shapes = []

    def replacement(self, shipped, *arguments):
        logprobs = arguments[-2 if name == "_kl_penalty" else 1]
        torch.testing.assert_close(logprobs.logsumexp(-1), torch.zeros_like(logprobs[..., 0]), atol=1e-5, rtol=0)
        shapes.append(logprobs.shape)
        return shipped(self, *arguments)

    (plain,) = steps(tiny_models.trainer(kl_penalty="full"), 1)
    (ours,) = steps(trainer_with(monkeypatch, "subclass", name, replacement, kl_penalty="full"), 1)
    assert shapes and all(len(shape) == dims and shape[-1] == tiny_models.VOCAB for shape in shapes)
    assert scalars(ours) == pytest.approx(scalars(plain), rel=1e-4, abs=1e-6)


# ---- TRL's own methods, copied into a subclass ---------------------------------------------------------------------


class WithTrlStep(ppo_ext.PPOTrainer):
    """A `step` with the calls of TRL 0.11.4's, as programs that copied and changed it have."""

    def step(self, queries, responses, scores, response_masks=None):
        size, full = self.config.batch_size, self.config.kl_penalty == "full"
        queries, responses, scores, response_masks = self._step_safety_checker(
            size, queries, responses, scores, response_masks
        )
        scores = torch.tensor(scores, device=self.current_device)
        model_inputs = self.prepare_model_inputs(queries, responses)
        batch = (queries, responses, model_inputs)
        with torch.no_grad():
            all_logprobs, logits, values, masks = self.batched_forward_pass(
                self.model, *batch, response_masks=response_masks, return_logits=full
            )
            with self.optional_peft_ctx():
                ref_model = self.model if self.is_peft_model else self.ref_model
                ref_logprobs, ref_logits, _, _ = self.batched_forward_pass(ref_model, *batch, return_logits=full)
            compared = (logits.log_softmax(-1), ref_logits.log_softmax(-1)) if full else (all_logprobs, ref_logprobs)
            rewards, non_score_reward, kls = self.compute_rewards(scores, *compared, masks)
            values, advantages, returns = self.compute_advantages(values, rewards, masks)
        all_stats = []
        for _ in range(self.config.ppo_epochs):
            order = np.random.permutation(size)
            for start in range(0, size, self.config.mini_batch_size):
                rows = order[start : start + self.config.mini_batch_size]
                with self.accelerator.accumulate(self.model):
                    logprobs, logits, vpreds, _ = self.batched_forward_pass(
                        self.model,
                        [queries[i] for i in rows],
                        [responses[i] for i in rows],
                        {name: x[rows] for name, x in model_inputs.items()},
                        return_logits=True,
                    )
                    old = (all_logprobs[rows], values[rows])
                    rest = (masks[rows], advantages[rows], returns[rows])
                    all_stats.append(self.train_minibatch(*old, logprobs, logits, vpreds, *rest))
            if self.config.early_stopping and self._early_stop(all_stats[-1]["policy/policykl"]):
                break
        train_stats = ppo_ext.trl.core.stack_dicts(all_stats)
        for name in ("policy/advantages", "policy/ratio"):
            train_stats[name] = torch.flatten(train_stats[name]).unsqueeze(0)
        stats = self.record_step_stats(
            scores=scores, logprobs=all_logprobs, ref_logprobs=ref_logprobs, non_score_reward=non_score_reward,
            train_stats=train_stats, kl_coef=self.kl_ctl.value, masks=masks, queries=queries, responses=responses,
            kls=kls,
        )  # fmt: skip
        stats = ppo_ext.trl.core.stats_to_np(stats)
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.kl_ctl.update(stats["objective/kl"], size * self.accelerator.num_processes)
        return ppo_ext.trl.core.convert_to_scalar(stats)


@pytest.mark.parametrize(
    "config", [{}, {"kl_penalty": "full"}, {"gradient_accumulation_steps": 2, "exact_update": False}], ids=str
)
def test_a_copied_step_gives_our_statistics(config):
    plain, copied = (steps(tiny_models.trainer(kind=kind, **config), 2) for kind in (None, WithTrlStep))
    for ours, theirs in zip(plain, copied, strict=True):
        assert {key for key in ours if not key.startswith("time/")} == theirs.keys()
        for key, value in theirs.items():
            np.testing.assert_allclose(value, ours[key], rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize(
    "name",
    [
        "step",
        "_step_safety_checker",
        "prepare_model_inputs",
        "batched_forward_pass",
        "compute_rewards",
        "_kl_penalty",
        "compute_advantages",
        "train_minibatch",
        "loss",
        "record_step_stats",
        "gather_stats",
    ],
)
def test_trls_own_method_runs_in_a_subclass(name):
    method = vars(require_trl().PPOTrainer)[name]
    kind = type("WithTrlMethod", (ppo_ext.PPOTrainer,), {name: method})
    plain, theirs = (steps(tiny_models.trainer(kind=kind), 2)[-1] for kind in (None, kind))
    assert plain.keys() == theirs.keys()
    assert scalars(theirs) == pytest.approx(scalars(plain), rel=1e-4, abs=1e-6)
