"""A critic of its own: a model that is trained beside the policy, and gives the values in the place of its value head."""

import os
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..models import loading, lora, probe
from ..models.auto import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from ..models.limits import first_position
from ..models.modes import evaluating
from ..models.token_scores import HeadInput
from ..models.value_head import run
from ..models.wrapper import recompute_layers
from .rollout import position_ids, takes_position_ids

FOLDER = "critic"  # within that of a saved policy
_HEADS = ("score", "classifier")  # of transformers' models for the classification of sequences or tokens


class Critic(nn.Module):
    """The values [B, T] float32 (float64 of a float64 model) of a model with a value head or with one label per token.

    The latter are transformers' classes for classification with num_labels=1, such as a reward model. Their head is given
    every token's hidden state, and its product is of float32. A model with a value head makes no logits.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.backbone = [getattr(model, "pretrained_model", model)]  # in a list, so that no module has two names
        self.takes_position_ids = takes_position_ids(self.backbone[0]) and not self.is_encoder_decoder
        self.first_position = first_position(model)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the values are those of a decoder's tokens."""
        return bool(self.backbone[0].config.is_encoder_decoder)

    def recompute_layers(self) -> None:
        """Turns gradient checkpointing on."""
        recompute_layers(self.backbone[0])
        self.backbone[0].enable_input_require_grads()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """inputs: of an encoder-decoder, decoder_*. Positions are counted from the first token that is not padding."""
        inputs = {name: x for name, x in inputs.items() if name.startswith("decoder_")}
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_position_ids:
            inputs["position_ids"] = position_ids(attention_mask, self.first_position)
        if hasattr(self.model, "v_head"):
            values = self.model.v_head(self._hidden_states(inputs))
        else:
            values = self._classify(inputs)
        return values.squeeze(-1).to(torch.promote_types(values.dtype, torch.float32))

    def _hidden_states(self, inputs: dict[str, Any]) -> torch.Tensor:
        with HeadInput(self.model._find_lm_head()):
            return run(self.backbone[0], use_cache=False, **inputs)[1]

    def _classify(self, inputs: dict[str, Any]) -> torch.Tensor:
        base = _base(self.model)
        hidden = getattr(base, base.base_model_prefix)(**inputs, use_cache=False, return_dict=True).last_hidden_state
        head = next(getattr(base, name) for name in _HEADS if hasattr(base, name))
        with torch.autocast(hidden.device.type, enabled=False):
            if type(head) is not nn.Linear:
                return head(hidden)
            dtype = torch.promote_types(head.weight.dtype, torch.float32)
            bias = None if head.bias is None else head.bias.to(dtype)
            return nn.functional.linear(hidden.to(dtype), head.weight.to(dtype), bias)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---- checks ----------------------------------------------------------------------------------------------------------


def is_language_model(model: Any) -> bool:
    """Whether a model is one of transformers or peft without a value head."""
    return (isinstance(model, PreTrainedModel) or lora.is_peft_model(model)) and not hasattr(model, "v_head")


def has_token_head(model: Any) -> bool:
    """Whether a model of transformers or peft is one for classification, with one label."""
    if not is_language_model(model):
        return False
    base = _base(model)
    return any(hasattr(base, name) for name in _HEADS) and getattr(base.config, "num_labels", None) == 1


def make(critic_model: Any, policy: Any, reference: Any) -> Critic:
    """The critic of a policy. Weights of it that no value depends on, such as a head for logits, are frozen.

    policy, reference: models with a value head; reference may be None.
    Raises: ValueError for a model that gives no value per token, that reads later tokens, or of which nothing is trained.
    """
    lora.refuse_injected("PPOTrainer", getattr(critic_model, "pretrained_model", critic_model))
    critic = Critic(critic_model)
    kind = type(_base(critic.backbone[0])).__name__
    if critic.is_encoder_decoder != bool(policy.config.is_encoder_decoder):
        _fail(
            f"be {'a decoder-only' if critic.is_encoder_decoder else 'an encoder-decoder'} model as model is, got {kind}"
        )
    trained = {name: p for name, p in critic.named_parameters() if p.requires_grad}
    others = {id(p) for model in (policy, reference) if model is not None for p in model.parameters()}
    shared = next((name for name, p in trained.items() if id(p) in others), None)
    if shared is not None:
        _fail(f"share no trained weights with model or ref_model, got {shared.removeprefix('model.')}")
    _probe(critic, kind, trained)
    return critic


def _probe(critic: Critic, kind: str, trained: dict[str, nn.Parameter]) -> None:
    inputs = probe.token_inputs(critic.backbone[0])
    read = "decoder_input_ids" if critic.is_encoder_decoder else "input_ids"
    other = {**inputs, read: inputs[read].clone()}
    other[read][:, -1] = inputs[read][:, 0]
    with torch.enable_grad(), evaluating(critic):
        values, of_other = critic(**inputs), critic(**other)
    if values.shape != inputs[read].shape:
        _fail(f"give one value per token, [1, {inputs[read].shape[1]}], got {list(values.shape)} from {kind}")
    if not probe.same(values[:, :-1], of_other[:, :-1]):
        _fail(f"read no token after the one of the value, got {kind}, whose values change with later tokens")
    used = probe.reached(values, trained.values())
    if not used:
        _fail("have weights that require a gradient, got none")
    for parameter in trained.values():
        parameter.requires_grad_(id(parameter) in used)


def check_settings(config: Any, critic: Any, optimizer: Any = None) -> None:
    """Raises ValueError for fields of PPOConfig that only a critic, or only an optimizer of the trainer's own, has."""
    given = [name for name in ("critic_learning_rate", "critic_warmup_steps") if getattr(config, name)]
    if given and critic is None:
        _fail(f"be given with PPOConfig.{given[0]} = {getattr(config, given[0])}, got None")
    if config.critic_learning_rate is not None and optimizer is not None:
        raise ValueError(
            "PPOTrainer: PPOConfig.critic_learning_rate must be None with an optimizer, whose groups have rates of their "
            f"own, got {config.critic_learning_rate}"
        )


def _fail(condition: str) -> NoReturn:
    raise ValueError(f"PPOTrainer: critic_model must {condition}")


# ---- policies without a value head, files ----------------------------------------------------------------------------


def with_value_head(model: Any) -> Any:
    """The model of transformers or peft in the class that the trainer works with. Its value head is not used."""
    if not is_language_model(model):
        return model
    encoder_decoder = model.config.is_encoder_decoder
    kind = AutoModelForSeq2SeqLMWithValueHead if encoder_decoder else AutoModelForCausalLMWithValueHead
    return kind.from_pretrained(model)


def load(folder: str, options: dict[str, Any]) -> Any:
    """The critic that was saved in a folder, of the class that it had, with weights to be trained."""
    if loading.read_v_head(folder, {}):
        encoder_decoder = transformers.AutoConfig.from_pretrained(
            lora.base_model_of(folder, options) if lora.find_adapter(folder, options) else folder
        ).is_encoder_decoder
        kind = AutoModelForSeq2SeqLMWithValueHead if encoder_decoder else AutoModelForCausalLMWithValueHead
        return kind.from_pretrained(folder, **options)
    if lora.find_adapter(folder, options):
        raise ValueError(
            f"PPOTrainer.from_pretrained: critic_model must be given for an adapter with a head of its own, got {folder}"
        )
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder)


def has_critic(source: str) -> bool:
    """Whether a policy was saved with its critic."""
    return os.path.isdir(os.path.join(source, FOLDER))
