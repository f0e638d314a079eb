"""Value-head models with the names, parameters and files of TRL 0.11.4 (`trl/models`).

These differences from TRL are on purpose:
- logits keep the backbone's dtype: the ops accumulate in fp32, so an fp32 copy of [B, T, V] would only cost memory;
- values are fp32, also under autocast;
- a key/value cache and the hidden states of all layers are kept only if asked for;
- weights are read and written as safetensors only;
- `compute_reward_score` leaves training modes and requires_grad flags as they were;
- layers that are shared with the reference model are the same tensors.
"""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from .reference_model import create_reference_model
from .value_head import ValueHead
from .wrapper import PreTrainedModelWrapper

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
    "ValueHead",
    "create_reference_model",
]


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A causal language model with a value head. Source: TRL 0.11.4, the class of the same name."""

    transformers_parent_class = AutoModelForCausalLM
    lm_head_namings = ("lm_head", "embed_out")


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder model with a value head on the decoder. Source: TRL 0.11.4, the class of the same name."""

    transformers_parent_class = AutoModelForSeq2SeqLM

    def __init__(self, pretrained_model: Any, **kwargs: Any) -> None:
        super().__init__(pretrained_model, **kwargs)
        self.is_encoder_decoder = True
