"""Subclasses written for TRL's trainer: they copy its methods, or inherit from transformers.Trainer as well."""

import inspect
import re
import warnings

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from conftest import require_trl

import ppo_ext.trl

BATCH = tiny_models.batch(4, 1)
# what one may copy out of TRL's PPOTrainer into a class of one's own
COPIED = [
    "_early_stop",
    "_kl_penalty",
    "_step_safety_checker",
    "batched_forward_pass",
    "compute_advantages",
    "compute_rewards",
    "gather_stats",
    "loss",
    "prepare_model_inputs",
    "record_step_stats",
    "step",
    "train_minibatch",
]


def theirs(**config):
    trl = require_trl()
    model = tiny_models.build("gpt2")
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = trl.AutoModelForCausalLMWithValueHead.from_pretrained(model)
        settings = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-3, **config}
        return trl.PPOTrainer(trl.PPOConfig(**settings), wrapped, None, tiny_models.tokenizer())


def compare(got, expected):
    assert got.keys() == expected.keys() and len(expected) == 40
    scalars = [key for key, value in expected.items() if np.size(value) == 1 and not key.startswith("time/")]
    for key in scalars:
        assert got[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("kl_penalty", ["kl", "full"])
def test_each_method_copied_from_trl(kl_penalty):
    trl, config = require_trl(), {"kl_penalty": kl_penalty, "early_stopping": True}
    expected = [theirs(**config)]
    expected = [expected[0].step(*BATCH), expected[0].step(*BATCH)]
    for name in COPIED:
        kind = type("Copied", (ppo_ext.trl.PPOTrainer,), {name: getattr(trl.PPOTrainer, name)})
        trainer = tiny_models.trainer(kind=kind, **config)
        for stats in expected:
            try:
                compare(trainer.step(*BATCH), stats)
            except BaseException as error:
                error.add_note(f"with TRL's own {name}")
                raise


def test_best_reward_attributes_are_there_only_when_asked_for():
    plain, pushing = tiny_models.trainer(), tiny_models.trainer(push_to_hub_if_best_kwargs={"repo_id": "me/mine"})
    for name in ("highest_reward", "push_to_hub_kwargs"):
        assert not hasattr(plain, name) and hasattr(pushing, name)
    assert pushing.push_to_hub_kwargs == {"repo_id": "me/mine"} and pushing.highest_reward == -float("inf")


def test_a_replaced_penalty_gets_the_whole_vocabulary_under_full():
    shapes = []

    class Own(ppo_ext.trl.PPOTrainer):
        def _kl_penalty(self, logprob, ref_logprob):
            shapes.append((tuple(logprob.shape), logprob.exp().sum(-1)))
            return super()._kl_penalty(logprob, ref_logprob)

    own, plain = (tiny_models.trainer(kind=kind, kl_penalty="full") for kind in (Own, ppo_ext.trl.PPOTrainer))
    got, expected = own.step(*BATCH), plain.step(*BATCH)
    assert got["objective/kl"] == pytest.approx(expected["objective/kl"], abs=1e-6)
    assert len(shapes) == 4 and {len(shape) for shape, _ in shapes} == {2}
    assert all(shape[1] == tiny_models.VOCAB and torch.allclose(total, torch.ones(())) for shape, total in shapes)


def names_of(kind):
    """Every attribute and method that a class has or that its code sets on itself."""
    return set(dir(kind)) | set(re.findall(r"self\.(\w+)", inspect.getsource(kind)))


def test_no_name_of_ours_hides_one_of_transformers():
    added = {*dir(ppo_ext.trl.PPOTrainer), *vars(tiny_models.trainer())} - set(dir(require_trl().PPOTrainer))
    added -= set(vars(theirs()))
    others = (
        names_of(transformers.Trainer) | names_of(transformers.TrainerCallback) | names_of(transformers.TrainerState)
    )
    assert len(added) > 20 and not added & others - set(dir(object)), added & others


class Both(ppo_ext.trl.PPOTrainer, transformers.Trainer):
    """The shape of LLaMA-Factory's trainer: PPO's steps, and transformers' callbacks, state and files."""

    def __init__(self, args, **options):
        ppo_ext.trl.PPOTrainer.__init__(self, **options)
        self.args, self.is_deepspeed_enabled, self.is_fsdp_enabled = args, False, False
        self.state, self.control = transformers.TrainerState(), transformers.TrainerControl()
        self.callback_handler = transformers.trainer.CallbackHandler(
            [], self.model, self.tokenizer, self.optimizer, self.lr_scheduler
        )


def test_a_class_that_is_a_transformers_trainer_as_well(tmp_path):
    seen = []

    class Note(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    model = ppo_ext.trl.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2"))
    trainer = Both(
        transformers.TrainingArguments(tmp_path, report_to=[]),
        config=ppo_ext.trl.PPOConfig(batch_size=4, mini_batch_size=2),
        model=model,
        tokenizer=tiny_models.tokenizer(),
    )
    trainer.add_callback(Note)
    assert np.isfinite(trainer.step(*BATCH)["ppo/loss/total"])
    trainer.state.global_step = 1
    trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)
    assert seen == [1] and trainer.is_world_process_zero()
    trainer.save_state()
    assert transformers.TrainerState.load_from_json(tmp_path / "trainer_state.json").global_step == 1


def test_helpers_of_subclasses(capsys):
    trl, trainer = require_trl(), tiny_models.trainer()
    given = {"logits": 1, "labels": 2, "nothing": 3}
    target = ppo_ext.logprobs
    assert trainer._filter_kwargs(given, target) == trl.PPOTrainer._filter_kwargs(None, given, target)
    assert trainer._filter_kwargs(given, target) == {"logits": 1, "labels": 2}
    printed = []
    for show in (trainer._show_tokens, lambda *a: trl.PPOTrainer._show_tokens(trainer, *a)):
        show(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 1]))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].split() == ["w5", "w6", "w7"]


def test_tags_are_those_of_the_class(tmp_path):
    class Tagged(ppo_ext.trl.PPOTrainer):
        _tag_names = [*ppo_ext.trl.PPOTrainer._tag_names, "mine"]

    tiny_models.trainer(kind=Tagged).create_model_card(tmp_path)
    assert "tags:\n- ppo_ext\n- ppo\n- reinforcement-learning\n- mine\n---" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("kind", ["gpt2", "t5", "lora"])
def test_a_trainer_from_the_folder_of_another(tmp_path, kind):
    peft = pytest.importorskip("peft")
    options = {}
    if kind == "lora":
        base = tmp_path / "base"
        tiny_models.build("llama").save_pretrained(base)
        options = {"peft_config": peft.LoraConfig(r=2, task_type="CAUSAL_LM")}
    first = tiny_models.trainer({"lora": "llama"}.get(kind, kind), **options)
    if kind == "lora":
        first.model.pretrained_model.peft_config["default"].base_model_name_or_path = str(base)
    first.save_pretrained(tmp_path / "run")
    config = ppo_ext.trl.PPOConfig(batch_size=4, mini_batch_size=2)
    second = ppo_ext.trl.PPOTrainer.from_pretrained(tmp_path / "run", config=config)
    assert type(second.model) is type(first.model) and second.config is config
    assert second.is_peft_model == (kind == "lora") and second.model_params
    before, after = tiny_models.weights(first), tiny_models.weights(second)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
