"""`trl.models.modeling_base`: what the value-head models have in common, and the reference model."""

from typing import TYPE_CHECKING

from ...models.reference_model import LAYER_PATTERNS, create_reference_model
from ...models.wrapper import PreTrainedModelWrapper
from .._names import module_getattr

__all__ = ["LAYER_PATTERNS", "PreTrainedModelWrapper", "create_reference_model"]

if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
