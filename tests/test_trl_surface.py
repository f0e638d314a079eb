"""The names, signatures and attributes of TRL 0.11.4 that a script or a subclass may use exist in ppo_ext.trl."""

import importlib
import inspect
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
        "SUPPORTED_ARCHITECTURES",
        "create_reference_model",
        "set_seed",
    ],
    ".core": ["LengthSampler", "respond_to_batch", "logprobs_from_logits", "set_seed"],
    ".models": ["AutoModelForCausalLMWithValueHead", "create_reference_model", "PreTrainedModelWrapper"],
    ".trainer": ["AdaptiveKLController", "FixedKLController", "PPOConfig", "PPOTrainer", "RunningMoments"],
    ".extras": ["BestOfNSampler"],
}


@pytest.mark.parametrize("module", IMPORTS)
def test_names(module):
    require_trl()
    theirs, ours = (importlib.import_module(root + module) for root in ("trl", "ppo_ext.trl"))
    for name in IMPORTS[module]:
        assert hasattr(theirs, name) and hasattr(ours, name), name


def test_import_utils():
    from ppo_ext.trl import import_utils

    assert import_utils.is_peft_available() is (importlib.util.find_spec("peft") is not None)
    assert not import_utils.is_npu_available() and not import_utils.is_xpu_available()


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
