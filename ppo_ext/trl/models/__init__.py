"""The PPO part of `trl.models`."""

from typing import TYPE_CHECKING

from .._names import module_getattr
from ..import_utils import is_diffusers_available
from . import modeling_base, modeling_value_head, utils
from .modeling_base import PreTrainedModelWrapper, create_reference_model
from .modeling_value_head import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, ValueHead
from .utils import SUPPORTED_ARCHITECTURES, unwrap_model_for_generation

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
    "SUPPORTED_ARCHITECTURES",
    "ValueHead",
    "create_reference_model",
    "is_diffusers_available",
    "modeling_base",
    "modeling_value_head",
    "unwrap_model_for_generation",
    "utils",
]

if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
