"""What TRL's scripts ask `trl.import_utils`: which packages are installed, and in which version."""

from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from accelerate.utils import is_npu_available, is_xpu_available
from packaging.version import Version

from ._names import module_getattr

__all__ = [
    "is_accelerate_greater_20_0",
    "is_bitsandbytes_available",
    "is_diffusers_available",
    "is_liger_available",
    "is_liger_kernel_available",
    "is_llmblender_available",
    "is_npu_available",
    "is_openai_available",
    "is_peft_available",
    "is_pil_available",
    "is_rich_available",
    "is_sklearn_available",
    "is_torch_greater_2_0",
    "is_torchvision_available",
    "is_transformers_greater_than",
    "is_unsloth_available",
    "is_wandb_available",
    "is_xpu_available",
]


def is_bitsandbytes_available() -> bool:
    return find_spec("bitsandbytes") is not None


def is_diffusers_available() -> bool:
    return find_spec("diffusers") is not None


def is_liger_kernel_available() -> bool:
    return find_spec("liger_kernel") is not None


is_liger_available = is_liger_kernel_available  # its name in TRL 0.10


def is_llmblender_available() -> bool:
    return find_spec("llm_blender") is not None


def is_openai_available() -> bool:
    return find_spec("openai") is not None


def is_peft_available() -> bool:
    return find_spec("peft") is not None


def is_pil_available() -> bool:
    return find_spec("PIL") is not None


def is_rich_available() -> bool:
    return find_spec("rich") is not None


def is_sklearn_available() -> bool:
    return find_spec("sklearn") is not None


def is_torchvision_available() -> bool:
    return find_spec("torchvision") is not None


def is_unsloth_available() -> bool:
    return find_spec("unsloth") is not None


def is_wandb_available() -> bool:
    return find_spec("wandb") is not None


def is_accelerate_greater_20_0() -> bool:
    """Whether accelerate is 0.20.0 or newer, equal included as in TRL."""
    return Version(version("accelerate")) >= Version("0.20.0")


def is_torch_greater_2_0() -> bool:
    """Whether torch is 2.0 or newer, equal included as in TRL."""
    return Version(version("torch")) >= Version("2.0")


def is_transformers_greater_than(current_version: str) -> bool:
    """Whether transformers is newer than `current_version`. (TRL compares the strings, so "4.9" is above "4.46".)"""
    return Version(version("transformers")) > Version(current_version)


if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
