"""TRL's names: write `from ppo_ext.trl import PPOTrainer, PPOConfig, ...` where a script has `from trl import ...`.

The modules below have TRL's paths (`ppo_ext.trl.trainer.ppo_trainer`, `ppo_ext.trl.models.modeling_value_head`, ...), so
that exchanging `trl` for `ppo_ext.trl` is enough. TRL itself is not needed. Names and signatures are those of TRL 0.11.4
for PPO, supervised fine-tuning and reward models, and those that only 0.7 to 0.10 have; docs/migrating-from-trl.md lists
where the numbers differ. A name or a module that is not here raises ImportError with one sentence: the rest stays in
trl.
"""

from typing import TYPE_CHECKING

from . import core, env_utils, extras, import_utils, models, trainer
from ._names import AbsentModules, module_getattr
from .core import set_seed
from .extras import BestOfNSampler
from .import_utils import (
    is_bitsandbytes_available,
    is_diffusers_available,
    is_liger_kernel_available,
    is_llmblender_available,
    is_npu_available,
    is_openai_available,
    is_peft_available,
    is_pil_available,
    is_wandb_available,
    is_xpu_available,
)
from .models import (
    SUPPORTED_ARCHITECTURES,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
    create_reference_model,
)
from .trainer import LAZY, AdaptiveKLController, FixedKLController, PPOConfig, PPOTrainer, RunningMoments

if TYPE_CHECKING:
    from .trainer import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

__version__ = "0.11.4"  # programs compare it with the TRL that they need; ppo_ext's own is ppo_ext.__version__

__all__ = [
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BestOfNSampler",
    "FixedKLController",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "RewardConfig",
    "RewardTrainer",
    "RunningMoments",
    "SFTConfig",
    "SFTTrainer",
    "SUPPORTED_ARCHITECTURES",
    "core",
    "create_reference_model",
    "env_utils",
    "extras",
    "import_utils",
    "is_bitsandbytes_available",
    "is_diffusers_available",
    "is_liger_kernel_available",
    "is_llmblender_available",
    "is_npu_available",
    "is_openai_available",
    "is_peft_available",
    "is_pil_available",
    "is_wandb_available",
    "is_xpu_available",
    "models",
    "set_seed",
    "trainer",
]

if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__, LAZY)

AbsentModules(__name__).install()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
