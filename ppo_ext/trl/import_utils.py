"""The checks that TRL's PPO scripts import from `trl.import_utils`."""

from importlib.util import find_spec

from transformers.utils import is_torch_npu_available as is_npu_available
from transformers.utils import is_torch_xpu_available as is_xpu_available

__all__ = ["is_npu_available", "is_peft_available", "is_rich_available", "is_wandb_available", "is_xpu_available"]


def is_peft_available():
    return find_spec("peft") is not None


def is_rich_available():
    return find_spec("rich") is not None


def is_wandb_available():
    return find_spec("wandb") is not None
