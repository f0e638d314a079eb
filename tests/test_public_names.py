"""The public names of `ppo_ext` and `ppo_ext.trl`: none may vanish, and all that is listed can be imported."""

import ast
from pathlib import Path

import pytest
from ops import OPS

import ppo_ext
import ppo_ext.trl

NAMES = {
    "ppo_ext": """AdaptiveKLController AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead
        FixedKLController PPOConfig PPOTrainer PreTrainedModelWrapper RewardConfig RewardTrainer SFTConfig SFTTrainer
        check_labels create_reference_model length_adaptive_lam normalize_rewards patch_trl reward_loss reward_scores
        unpatch_trl""",
    "ppo_ext.trl": """AdaptiveKLController AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead
        BestOfNSampler FixedKLController PPOConfig PPOTrainer PreTrainedModelWrapper RewardConfig RewardTrainer
        RunningMoments SFTConfig SFTTrainer SUPPORTED_ARCHITECTURES core create_reference_model env_utils extras
        import_utils is_bitsandbytes_available is_diffusers_available is_liger_kernel_available is_llmblender_available
        is_npu_available is_openai_available is_peft_available is_pil_available is_wandb_available is_xpu_available
        models set_seed trainer""",
}
MODULES = {"ppo_ext": ppo_ext, "ppo_ext.trl": ppo_ext.trl}
FROM_LIST = {"ppo_ext": OPS, "ppo_ext.trl": ()}  # the ops of ops.py


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_these(module):
    names = [*NAMES[module].split(), *FROM_LIST[module]]
    assert sorted(MODULES[module].__all__) == sorted(names)
    assert set(names) <= set(dir(MODULES[module]))
    assert all(getattr(MODULES[module], name) is not None for name in names)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ppo_ext' has no attribute 'PPOTrainr'"):
        ppo_ext.PPOTrainr  # noqa: B018


def test_type_checkers_import_what_is_imported_on_first_use():
    tree = ast.parse(Path(ppo_ext.__file__).read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert seen == ppo_ext._LAZY
