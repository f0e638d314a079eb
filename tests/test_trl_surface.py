"""The names, signatures and attributes of TRL 0.11.4 that a script or a subclass may use exist in ppo_ext.trl."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import subprocess
import sys
import warnings

import pytest
import tiny_models
import torch
from conftest import require_trl

import ppo_ext.trl

IMPORTS = {
    "": [
        "AutoModelForCausalLMWithValueHead",
        "AutoModelForSeq2SeqLMWithValueHead",
        "PPOConfig",
        "PPOTrainer",
        "PreTrainedModelWrapper",
        "RewardConfig",
        "RewardTrainer",
        "SFTConfig",
        "SFTTrainer",
        "SUPPORTED_ARCHITECTURES",
        "create_reference_model",
        "set_seed",
    ],
    ".core": ["LengthSampler", "respond_to_batch", "logprobs_from_logits", "set_seed"],
    ".models": ["AutoModelForCausalLMWithValueHead", "create_reference_model", "PreTrainedModelWrapper"],
    ".trainer": [
        "AdaptiveKLController",
        "FixedKLController",
        "PPOConfig",
        "PPOTrainer",
        "RewardConfig",
        "RewardTrainer",
        "RunningMoments",
        "SFTConfig",
        "SFTTrainer",
        "compute_accuracy",
    ],
    ".trainer.utils": ["AdaptiveKLController", "RewardDataCollatorWithPadding", "compute_accuracy"],
    ".extras": ["BestOfNSampler"],
}


@pytest.mark.parametrize("module", IMPORTS)
def test_names(module):
    require_trl()
    theirs, ours = (importlib.import_module(root + module) for root in ("trl", "ppo_ext.trl"))
    for name in IMPORTS[module]:
        # dir, as today's transformers without liger-kernel makes TRL's SFTTrainer fail to import
        assert name in dir(theirs) and hasattr(ours, name), name
    assert [name for name in getattr(ours, "__all__", []) if not hasattr(ours, name)] == []


def test_import_utils():
    from ppo_ext.trl import import_utils

    assert import_utils.is_peft_available() is (importlib.util.find_spec("peft") is not None)
    assert not import_utils.is_npu_available() and not import_utils.is_xpu_available()


def definition(module, name):
    """A class of TRL's, read and not imported."""
    source = pathlib.Path(require_trl().__file__).parent / "trainer" / f"{module}.py"
    classes = ast.parse(source.read_text(encoding="utf-8")).body
    return next(node for node in classes if isinstance(node, ast.ClassDef) and node.name == name)


@pytest.mark.parametrize(
    ("module", "name", "missing"),
    [
        ("reward_trainer", "RewardTrainer", set()),
        # infinite is deprecated there and says to use max_steps or num_train_epochs
        ("sft_trainer", "SFTTrainer", {"infinite"}),
    ],
)
def test_supervised_trainers_take_what_trl_takes(module, name, missing):
    init = next(node for node in definition(module, name).body if getattr(node, "name", "") == "__init__")
    expected = [argument.arg for argument in init.args.args]
    parameters = inspect.signature(getattr(ppo_ext.trl, name).__init__).parameters
    by_position = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == expected[: len(by_position)]
    fields = {field.name for field in dataclasses.fields(ppo_ext.trl.SFTConfig)} if name == "SFTTrainer" else set()
    assert set(expected) - set(by_position) - fields == missing


@pytest.mark.parametrize(("module", "name"), [("reward_config", "RewardConfig"), ("sft_config", "SFTConfig")])
def test_supervised_configs_have_trls_fields_and_defaults(module, name):
    expected = {
        node.target.id: ast.literal_eval(node.value)
        for node in definition(module, name).body
        if isinstance(node, ast.AnnAssign)
    }
    ours = {field.name: field.default for field in dataclasses.fields(getattr(ppo_ext.trl, name))}
    assert len(expected) >= 3
    assert {field: ours.get(field, "missing") for field in expected} == expected


def test_a_ppo_script_does_not_import_transformers_trainer():
    code = "import sys, ppo_ext.trl as t; t.PPOTrainer; assert 'transformers.trainer' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_trl_is_not_imported():
    code = "import sys, ppo_ext.trl; assert not any(name == 'trl' or name.startswith('trl.') for name in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_trainer_methods_take_what_trl_takes():
    theirs = {name: f for name, f in vars(require_trl().PPOTrainer).items() if inspect.isfunction(inspect.unwrap(f))}
    names = [name for name in theirs if not name.startswith("_")] + [
        "__init__",
        "_early_stop",
        "_generate_batched",
        "_kl_penalty",
        "_remove_unused_columns",
        "_save_pretrained",
        "_set_signature_columns_if_needed",
        "_step_safety_checker",
    ]
    for name in names:
        expected = list(inspect.signature(theirs[name]).parameters)
        got = list(inspect.signature(getattr(ppo_ext.trl.PPOTrainer, name)).parameters)
        assert got[: len(expected)] == expected, name


def test_trainer_attributes():
    trl = require_trl()
    ours = tiny_models.trainer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trl.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.gpt2())
        config = trl.PPOConfig(batch_size=4, mini_batch_size=2)
        theirs = trl.PPOTrainer(config, model, None, tiny_models.tokenizer())
    missing = {name for name in vars(theirs) if not hasattr(ours, name)}
    # TextEnvironment and huggingface_hub's mixin are not part of the trainer
    assert missing == {"is_using_text_environment", "_hub_mixin_config"}, missing


def test_best_of_n():
    model = ppo_ext.trl.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2"))
    tokenizer = tiny_models.tokenizer()

    def count(texts):
        return [float(text.count("w")) for text in texts]

    sampler = ppo_ext.trl.BestOfNSampler(model, tokenizer, count, lambda: 6, sample_size=5, n_candidates=2, seed=0)
    best = sampler.generate([torch.tensor([5, 6, 7]), torch.tensor([8])], do_sample=True, pad_token_id=0)
    assert [len(texts) for texts in best] == [2, 2] and all(
        count(texts) == sorted(count(texts), reverse=True) for texts in best
    )
    (alone,) = sampler.generate(torch.tensor([5, 6, 7]), do_sample=True, pad_token_id=0)
    assert len(alone) == 2
    with pytest.raises(TypeError, match="BestOfNSampler: model must be a model with a value head, got GPT2LMHeadModel"):
        ppo_ext.trl.BestOfNSampler(tiny_models.gpt2(), tokenizer, count, lambda: 6)
