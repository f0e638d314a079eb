"""A transformers or peft model with a value head: loading, forward passes, gradient checkpointing, saving."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel

from . import checkpoint, keywords, loading, lora
from .saving import SavingMixin, split_state
from .token_scores import HeadInput, TokenRequest, token_scores
from .value_head import ValueHead, run

logger = logging.getLogger(__name__)

Wrapper = TypeVar("Wrapper", bound="PreTrainedModelWrapper")


class PreTrainedModelWrapper(SavingMixin):
    """A transformers or peft model in `pretrained_model` and a value head in `v_head`; base of both public classes."""

    transformers_parent_class: ClassVar[Any] = None
    lm_head_namings: ClassVar[tuple[str, ...]] = ("lm_head", "embed_out", "output_projection")
    supported_args: ClassVar[tuple[str, ...]] = (
        "summary_dropout_prob",
        "v_head_initializer_range",
        "v_head_init_strategy",
    )
    supported_modules: ClassVar[tuple[str, ...]] = ("v_head",)
    supported_rm_modules: ClassVar[tuple[str, ...]] = lora.SCORE_MODULES

    score: nn.Linear  # of the reward adapter, if there is one

    def __init__(
        self,
        pretrained_model: Any,
        score_module: nn.Linear | None = None,
        supports_rm_adapter: bool = False,
        rm_adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        lora.refuse_injected(type(self).__name__, pretrained_model)
        self.pretrained_model = pretrained_model
        lm_head = self._find_lm_head()
        self.config = pretrained_model.config
        self.adapters_changed_the_base = False  # whether the model without its adapter is not the one that was loaded
        self.is_loaded_in_8bit = getattr(pretrained_model, "is_loaded_in_8bit", False)
        self.is_loaded_in_4bit = getattr(pretrained_model, "is_loaded_in_4bit", False)
        self.is_sequential_parallel = False  # whether the layers are spread over several devices
        self._output_device: torch.device | None = None  # where outputs are moved to in that case
        self.current_device = self._get_current_device()
        self.supports_rm_adapter = supports_rm_adapter
        self.rm_adapter_name = rm_adapter_name
        self.policy_adapter_name = "default"
        if score_module is not None:
            self.score = score_module
        self.v_head = ValueHead(self.config, **kwargs)
        device = next(lm_head.parameters()).device
        # under FSDP, ranks that wait for the weights of rank 0 hold the backbone on meta; moved there, the head would lose
        # its values
        if device.type != "meta":
            self.v_head.to(device)

    def _find_lm_head(self) -> nn.Module:
        lm_head = getattr(self.pretrained_model, "get_output_embeddings", lambda: None)()
        if lm_head is not None:
            return lm_head
        for name, module in self.pretrained_model.named_modules():
            if name.rpartition(".")[2] in self.lm_head_namings:
                return module
        wanted, got = " or ".join(self.lm_head_namings), type(self.pretrained_model).__name__
        raise ValueError(f"{type(self).__name__}: the model must have a language model head ({wanted}), got {got}")

    @classmethod
    def from_pretrained(
        cls: type[Wrapper], pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Wrapper:
        """Loads or wraps a model and gives it a value head, the saved one if the checkpoint has one.

        Args:
            pretrained_model_name_or_path: a local folder, a hub id, or a transformers or peft model.
            kwargs: peft_config, is_trainable, reward_adapter (a local folder) and reward_adapter_name, see `lora`.
                base_model: the transformers model that the adapter in a folder belongs to, where it is not the one in
                the path that the adapter's config names.
                `supported_args` go to `ValueHead`, everything else to `transformers_parent_class.from_pretrained`.

        Raises: ValueError for a path that does not exist, pickle weights, corrupt files and prompt learning.
        """
        peft_config = kwargs.pop("peft_config", None)
        reward_adapter = kwargs.pop("reward_adapter", None)
        reward_adapter_name = kwargs.pop("reward_adapter_name", "reward_adapter")
        is_trainable = kwargs.pop("is_trainable", False)
        base_model = kwargs.pop("base_model", None)
        head_kwargs, pretrained_kwargs, kbit_kwargs = cls._split_kwargs(kwargs)
        lora.check_arguments(peft_config, reward_adapter)

        source = pretrained_model_name_or_path
        if isinstance(source, (str, os.PathLike)):
            source = os.fspath(source)
            pretrained_kwargs = keywords.translate(pretrained_kwargs, cls._get_current_device())
            pretrained_model, adapter_found = loading.load_pretrained(
                cls.transformers_parent_class, source, is_trainable, model_args, pretrained_kwargs, base_model
            )
            if adapter_found and peft_config is not None:
                logger.warning("peft_config is ignored, since %s holds an adapter", source)
            v_head_state = loading.read_v_head(source, pretrained_kwargs)
        elif isinstance(getattr(source, "_orig_mod", source), PreTrainedModel) or lora.is_peft_model(source):
            pretrained_model = source  # a model of torch.compile has the model itself in _orig_mod
            v_head_state = {name: t for name, t in source.state_dict().items() if name.startswith("v_head.")}
            v_head_state = v_head_state or loading.read_v_head_of(source)
        else:
            raise TypeError(
                f"{cls.__name__}: pretrained_model_name_or_path must be a path, a hub id or a PreTrainedModel, "
                f"got {type(source).__name__}"
            )
        lora.refuse_injected(cls.__name__, pretrained_model)
        loading.drop_quantization_mark(pretrained_model)
        changed_the_base = False
        if peft_config is not None:
            pretrained_model, changed_the_base = lora.wrap(pretrained_model, peft_config, kbit_kwargs)
        lora.refuse_prompt_learning(pretrained_model)
        if reward_adapter is not None:
            head_kwargs.update(lora.add_reward_adapter(pretrained_model, reward_adapter, reward_adapter_name))
        model = cls(pretrained_model, **head_kwargs)
        model.adapters_changed_the_base = changed_the_base
        model.post_init(v_head_state)
        return model

    @classmethod
    def _split_kwargs(cls, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Returns the keywords of the value head, of transformers, and of peft's k-bit preparation."""
        head = {name: value for name, value in kwargs.items() if name in cls.supported_args}
        kbit = {name: value for name, value in kwargs.items() if name in lora.KBIT_ARGUMENTS}
        rest = {name: value for name, value in kwargs.items() if name not in head and name not in kbit}
        return head, rest, kbit

    @staticmethod
    def _get_current_device() -> int | str:
        return PartialState().local_process_index if torch.cuda.is_available() else "cpu"

    def post_init(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Loads the v_head.* entries of a state dict, if any, and prepares a model that is spread over devices."""
        v_head_state, _ = split_state(state_dict)
        if v_head_state:
            checkpoint.check_fits("v_head", self.v_head.state_dict(), v_head_state)
            self.v_head.load_state_dict(v_head_state)
        device_map = getattr(self.pretrained_model, "hf_device_map", None)
        if device_map is not None:
            self._gather_outputs(list(dict.fromkeys(device_map.values())))

    def _gather_outputs(self, devices: Sequence[Any]) -> None:
        """Makes `forward` move its outputs to the first of several devices."""
        if len(devices) > 1:
            if any(str(device) in ("cpu", "disk") for device in devices):
                raise ValueError(f"{type(self).__name__}: device_map must not offload to cpu or disk, got {devices}")
            self.is_sequential_parallel = True
            self._output_device = torch.device(devices[0])

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        return_past_key_values: bool = False,
        token_request: TokenRequest | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """A forward pass of the wrapped model and of the value head.

        Args:
            input_ids, attention_mask: [B, T] int64. kwargs: go to the wrapped model.
            token_request: the tokens to score, without logits; see `ppo_ext/trainer/head_route.py` for when that works.

        Returns: (logits [B, T, V] in the backbone's dtype, loss or None, value [B, T] fp32, or float64 of a float64
        head), and the key/value cache with return_past_key_values. With token_request, `TokenScores` instead of logits.
        """
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        elif not return_past_key_values:
            # nobody reads the cache, which costs memory; with gradient checkpointing transformers would warn about it
            kwargs.setdefault("use_cache", False)
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        scores = None
        if token_request is None:
            output, hidden_states = run(self.pretrained_model, **kwargs)
        else:
            with HeadInput(self._find_lm_head()) as read:
                output, hidden_states = run(self.pretrained_model, **kwargs)
            scores = token_scores(read.head, read.hidden, token_request)
        value = self.v_head(hidden_states.to(self.v_head.summary.weight.device)).squeeze(-1)
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        outputs: tuple[Any, ...] = (output.logits if scores is None else scores, output.loss, value)
        if self._output_device is not None:
            outputs = tuple(x.to(self._output_device) if isinstance(x, torch.Tensor) else x for x in outputs)
        return (*outputs, output.past_key_values) if return_past_key_values else outputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's `prepare_inputs_for_generation`."""
        return self.pretrained_model.prepare_inputs_for_generation(*args, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes the layers in the backward pass, by non-reentrant checkpointing unless the keywords say otherwise."""
        recompute_layers(self.pretrained_model, gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps all activations again."""
        _first_method(self.pretrained_model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()

    def enable_input_require_grads(self) -> None:
        """Makes the embeddings' output require a gradient, as reentrant checkpointing needs if embeddings are frozen."""
        self.pretrained_model.enable_input_require_grads()

    @classmethod
    def add_and_load_reward_modeling_adapter(
        cls, pretrained_model: Any, adapter_model_id: Any, adapter_name: str = "reward_model_adapter", token: Any = None
    ) -> nn.Linear:
        """Loads a reward adapter from a local folder into a peft model and returns its frozen score head.

        `from_pretrained` does this for reward_adapter. token: not used, part of TRL's signature.
        """
        return lora.add_reward_adapter(pretrained_model, adapter_model_id, adapter_name)["score_module"]

    def compute_reward_score(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Returns the reward adapter's scores [B, T, num_labels] without gradients; leaves the policy as it was."""
        if not self.supports_rm_adapter:
            raise ValueError("compute_reward_score: the model must be loaded with reward_adapter, got none")
        kwargs.update(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        with lora.active(self.pretrained_model, self.rm_adapter_name):
            _, hidden_states = run(self.pretrained_model, **kwargs)
            return self.score(hidden_states.to(self.score.weight))


def recompute_layers(model: Any, options: dict[str, Any] | None = None) -> None:
    """Gradient checkpointing of a transformers model, non-reentrant unless the options say otherwise."""
    enable = _first_method(model, "activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable(options or {"use_reentrant": False})


def _first_method(model: Any, *names: str) -> Any:
    """The first of these methods that the model has: transformers 5.23 calls activation checkpointing what 4.57 calls
    gradient checkpointing."""
    return next(getattr(model, name) for name in names if hasattr(model, name))
