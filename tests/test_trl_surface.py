"""The names, signatures and attributes of TRL 0.11.4 that a script or a subclass may use exist in ppo_ext.trl."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import pathlib
import subprocess
import sys
import warnings

import peft
import pytest
import tiny_models
import torch
import transformers
import trl_names
from conftest import require_trl
from peft.tuners.tuners_utils import BaseTunerLayer

import ppo_ext.trl

# one import of each module path that TRL's examples and the programs on it use
IMPORTS = """
from {0} import (AdaptiveKLController, AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig,
    FixedKLController, PPOTrainer, PreTrainedModelWrapper, SUPPORTED_ARCHITECTURES, create_reference_model, set_seed)
from {0} import __version__ as trl_version
from {0} import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, is_npu_available, is_peft_available, is_xpu_available
from {0}.core import LengthSampler, PPODecorators, respond_to_batch, logprobs_from_logits, set_seed
from {0}.env_utils import strtobool
from {0}.extras import BestOfNSampler
from {0}.extras.best_of_n_sampler import BestOfNSampler
from {0}.import_utils import is_npu_available, is_xpu_available, is_torch_greater_2_0
from {0}.models import SUPPORTED_ARCHITECTURES, PreTrainedModelWrapper, create_reference_model
from {0}.models.modeling_base import LAYER_PATTERNS, PreTrainedModelWrapper, create_reference_model
from {0}.models.modeling_value_head import AutoModelForCausalLMWithValueHead, ValueHead
from {0}.models.utils import unwrap_model_for_generation
from {0}.trainer import AdaptiveKLController, BaseTrainer, FixedKLController, PPOConfig, PPOTrainer, RunningMoments
from {0}.trainer.base import BaseTrainer
from {0}.trainer.ppo_config import PPOConfig
from {0}.trainer.ppo_trainer import PPOTrainer
from {0}.trainer import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, compute_accuracy
from {0}.trainer.reward_config import RewardConfig
from {0}.trainer.reward_trainer import RewardTrainer
from {0}.trainer.sft_config import SFTConfig
from {0}.trainer.sft_trainer import SFTTrainer
from {0}.trainer.utils import AdaptiveKLController, RunningMoments, disable_dropout_in_model
from {0}.trainer.utils import RewardDataCollatorWithPadding, compute_accuracy
import {0}.core, {0}.trainer.ppo_trainer, {0}.models.modeling_base
"""


def test_imports_of_programs():
    exec(IMPORTS.format("ppo_ext.trl"), {})
    assert ppo_ext.trl.__version__ == require_trl().__version__


@pytest.fixture(scope="module")
def evidence():
    return json.loads((trl_names.EVIDENCE / "trl_names.json").read_text(encoding="utf-8"))


def test_the_table_of_names_holds_those_of_the_installed_trl(evidence):
    root = pathlib.Path(require_trl().__file__).parent
    listed = {(row["module"], row["name"]) for row in evidence if "0.11.4" in row["releases"]}
    assert listed == set(trl_names.names_of(root))


def test_the_table_of_names_says_what_is_here(evidence):
    rows = [trl_names.row(trl_names.Name(row["module"], row["name"], row["releases"])) for row in evidence]
    assert rows == evidence
    assert not [row for row in rows if not row["here"] and not row["reason"]]
    assert sum(row["here"] for row in rows) > 200
    assert trl_names.markdown(rows) == (trl_names.EVIDENCE / "trl_names.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "module, name",
    [
        ("ppo_ext.trl", "DPOTrainer"),
        ("ppo_ext.trl", "TextEnvironment"),
        ("ppo_ext.trl.trainer", "KTOTrainer"),
        ("ppo_ext.trl.trainer.utils", "DPODataCollatorWithPadding"),
        ("ppo_ext.trl.models.utils", "prepare_fsdp"),  # of a TRL newer than those that have PPO
        ("ppo_ext.trl.core", "no_such_name"),
    ],
)
def test_what_is_not_ppo_says_to_stay_with_trl(module, name):
    sentence = f"{module} has no {name}: it holds what TRL 0.7 to 0.11 have for PPO; keep importing the rest from trl"
    with pytest.raises(ImportError, match=sentence):
        exec(f"from {module} import {name}", {})
    found = importlib.import_module(module)
    with pytest.raises(AttributeError, match=sentence):
        getattr(found, name)
    assert not hasattr(found, name) and getattr(found, name, None) is None


def test_modules_that_are_not_ppo_say_to_stay_with_trl(evidence):
    absent = [row["module"] for row in evidence if not row["name"] and not row["here"]]
    assert len(absent) > 50 and {"trainer.dpo_trainer", "environment.base_environment"} <= set(absent)
    for module in absent:
        sentence = "has no module \\w+: it holds what TRL 0.7 to 0.11 have for PPO; keep importing the rest from trl$"
        with pytest.raises(ModuleNotFoundError, match=sentence):
            exec(f"import ppo_ext.trl.{module}", {})
        with pytest.raises(ImportError, match="keep importing the rest from trl$"):
            exec(f"from ppo_ext.trl.{module} import SomeTrainer", {})


def test_a_question_for_an_absent_module_is_no_error():
    assert importlib.util.find_spec("ppo_ext.trl.trainer.dpo_trainer") is None
    assert importlib.util.find_spec("ppo_ext.trl.trainer.ppo_trainer") is not None


def test_the_sentence_about_modules_is_for_those_of_trl_alone():
    for module in ("ppo_ext.no_such_module", "no_such_module", "ppo_ext.trlx"):
        with pytest.raises(ModuleNotFoundError, match=f"^No module named '{module}'$"):
            importlib.import_module(module)


def test_a_second_import_adds_no_second_finder():
    before = list(sys.meta_path)
    importlib.reload(ppo_ext.trl._names)
    importlib.reload(ppo_ext.trl)
    assert [type(finder).__name__ for finder in sys.meta_path] == [type(finder).__name__ for finder in before]


def test_import_utils():
    ours, theirs = ppo_ext.trl.import_utils, require_trl().import_utils
    for name in ours.__all__:
        if hasattr(theirs, name) and name != "is_transformers_greater_than":
            expected = getattr(theirs, name)()
            # transformers 5 gives TRL 0.11.4 a pair with the version, which would always count as true
            assert getattr(ours, name)() == (expected[0] if isinstance(expected, tuple) else expected), name
    assert ours.is_peft_available() and not ours.is_npu_available() and not ours.is_xpu_available()
    assert not ours.is_transformers_greater_than(transformers.__version__)
    assert ours.is_transformers_greater_than("4.9") and not ours.is_transformers_greater_than("100.0")


@pytest.mark.parametrize("text", ["y", "TRUE", "on", "1", "no", "f", "Off", "0", "perhaps", ""])
def test_strtobool(text):
    require_trl()
    results = []
    for root in ("ppo_ext.trl", "trl"):
        try:
            results.append(importlib.import_module(f"{root}.env_utils").strtobool(text))
        except ValueError:
            results.append(ValueError)
    assert results[0] is results[1]


def test_helpers_of_trainers():
    require_trl()
    for root in ("ppo_ext.trl", "trl"):
        utils = importlib.import_module(f"{root}.trainer.utils")
        model = tiny_models.gpt2(resid_pdrop=0.3)
        utils.disable_dropout_in_model(model)
        drops = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        assert drops and not any(drops)
        assert utils.exact_div(12, 4) == 3
        with pytest.raises(ValueError, match="mine, inexact division: 13 / 4 = 3.25"):
            utils.exact_div(13, 4, "mine")


def test_a_trainer_is_a_base_trainer():
    base = importlib.import_module("ppo_ext.trl.trainer.base").BaseTrainer
    assert issubclass(ppo_ext.trl.PPOTrainer, base) and not issubclass(ppo_ext.trl.BestOfNSampler, base)

    class Own(base):
        pass

    assert Own(3).config == 3
    for method in (Own(3).step, Own(3).loss, Own(3).compute_rewards):
        with pytest.raises(NotImplementedError, match=f"BaseTrainer.{method.__name__}: a subclass must define it"):
            method()


@pytest.mark.parametrize("root", ["ppo_ext.trl", "trl"])
def test_unwrap_model_for_generation(root):
    require_trl()
    unwrap = importlib.import_module(f"{root}.models.utils").unwrap_model_for_generation
    trainer = tiny_models.trainer(peft_config=peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    (layer, *_) = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
    with unwrap(trainer.model, trainer.accelerator) as model:
        assert model is trainer.model and not layer.disable_adapters
    with unwrap(trainer.model, trainer.accelerator, is_peft_model=True):
        # TRL makes the context that switches the adapter off, but does not enter it
        assert layer.disable_adapters is (root == "ppo_ext.trl")
    assert not layer.disable_adapters


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
