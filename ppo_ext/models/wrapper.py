"""A transformers or peft model with a value head: loading, passes, gradient checkpointing, saving."""

import logging
import os

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel

from . import checkpoint, loading, lora
from .value_head import ValueHead, run

logger = logging.getLogger(__name__)


class PreTrainedModelWrapper(nn.Module):
    """A transformers or peft model in `pretrained_model` and a value head in `v_head`; base of both public classes."""

    transformers_parent_class = None
    lm_head_namings = ("lm_head", "embed_out", "output_projection")
    supported_args = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")
    supported_modules = ("v_head",)
    supported_rm_modules = lora.SCORE_MODULES

    def __init__(self, pretrained_model, score_module=None, supports_rm_adapter=False, rm_adapter_name=None, **kwargs):
        super().__init__()
        self.pretrained_model = pretrained_model
        lm_head = self._find_lm_head()
        self.config = pretrained_model.config
        self.is_peft_model = lora.is_peft_model(pretrained_model)
        self.is_loaded_in_8bit = getattr(pretrained_model, "is_loaded_in_8bit", False)
        self.is_loaded_in_4bit = getattr(pretrained_model, "is_loaded_in_4bit", False)
        self.is_sequential_parallel = False
        self.current_device = self._get_current_device()
        self.supports_rm_adapter = supports_rm_adapter
        self.rm_adapter_name = rm_adapter_name
        self.policy_adapter_name = "default"
        if score_module is not None:
            self.score = score_module
        self.v_head = ValueHead(self.config, **kwargs)
        device = next(lm_head.parameters()).device
        # ranks that wait for FSDP to send them the weights hold the backbone on meta, where the head would be lost
        if device.type != "meta":
            self.v_head.to(device)

    def _find_lm_head(self):
        for name, module in self.pretrained_model.named_modules():
            if name.rpartition(".")[2] in self.lm_head_namings:
                return module
        wanted, got = " or ".join(self.lm_head_namings), type(self.pretrained_model).__name__
        raise ValueError(f"{type(self).__name__}: the model must have a language model head ({wanted}), got {got}")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads or wraps a model and gives it a value head, the saved one if the checkpoint has one.

        pretrained_model_name_or_path: a local folder, a hub id, or a transformers or peft model.
        peft_config, is_trainable, reward_adapter (local folder), reward_adapter_name: see `lora`.
        `supported_args` go to `ValueHead`, everything else to `transformers_parent_class.from_pretrained`.
        Raises ValueError for a path that is not there, pickle weights, corrupt files, prompt learning.
        """
        peft_config = kwargs.pop("peft_config", None)
        reward_adapter = kwargs.pop("reward_adapter", None)
        reward_adapter_name = kwargs.pop("reward_adapter_name", "reward_adapter")
        is_trainable = kwargs.pop("is_trainable", False)
        head_kwargs, pretrained_kwargs, kbit_kwargs = cls._split_kwargs(kwargs)
        lora.check_arguments(peft_config, reward_adapter)

        source = pretrained_model_name_or_path
        if isinstance(source, (str, os.PathLike)):
            source = os.fspath(source)
            if pretrained_kwargs.get("load_in_8bit") or pretrained_kwargs.get("load_in_4bit"):
                pretrained_kwargs.setdefault("device_map", {"": cls._get_current_device()})
            pretrained_model, adapter_found = loading.load_pretrained(
                cls.transformers_parent_class, source, is_trainable, model_args, pretrained_kwargs
            )
            if adapter_found and peft_config is not None:
                logger.warning("peft_config is ignored, since %s holds an adapter", source)
            v_head_state = loading.read_v_head(source, pretrained_kwargs)
        elif isinstance(source, PreTrainedModel) or lora.is_peft_model(source):
            pretrained_model = source
            v_head_state = {name: t for name, t in source.state_dict().items() if name.startswith("v_head.")}
        else:
            raise TypeError(
                f"{cls.__name__}: pretrained_model_name_or_path must be a path, a hub id or a PreTrainedModel, "
                f"got {type(source).__name__}"
            )
        if peft_config is not None:
            pretrained_model = lora.wrap(pretrained_model, peft_config, kbit_kwargs)
        lora.refuse_prompt_learning(pretrained_model)
        if reward_adapter is not None:
            head_kwargs.update(lora.add_reward_adapter(pretrained_model, reward_adapter, reward_adapter_name))
        model = cls(pretrained_model, **head_kwargs)
        model.post_init(v_head_state)
        return model

    @classmethod
    def _split_kwargs(cls, kwargs):
        """Returns the keywords of the value head, of transformers, and of peft's k-bit preparation."""
        head = {name: value for name, value in kwargs.items() if name in cls.supported_args}
        kbit = {name: value for name, value in kwargs.items() if name in lora.KBIT_ARGUMENTS}
        rest = {name: value for name, value in kwargs.items() if name not in head and name not in kbit}
        return head, rest, kbit

    @staticmethod
    def _get_current_device():
        return PartialState().local_process_index if torch.cuda.is_available() else "cpu"

    def post_init(self, state_dict):
        """Loads the v_head.* entries of a state dict, if any; outputs of a model spread over devices are gathered."""
        v_head_state, _ = _split_state(state_dict)
        if v_head_state:
            checkpoint.check_fits("v_head", self.v_head.state_dict(), v_head_state)
            self.v_head.load_state_dict(v_head_state)
        device_map = getattr(self.pretrained_model, "hf_device_map", None)
        if device_map is not None:
            self._gather_outputs(list(dict.fromkeys(device_map.values())))

    def _gather_outputs(self, devices):
        if len(devices) > 1:
            if any(str(device) in ("cpu", "disk") for device in devices):
                raise ValueError(f"{type(self).__name__}: device_map must not offload to cpu or disk, got {devices}")
            first = torch.device(devices[0])
            self.is_sequential_parallel = True
            self.register_forward_hook(
                lambda module, inputs, outputs: tuple(
                    o.to(first) if isinstance(o, torch.Tensor) else o for o in outputs
                )
            )

    def forward(
        self, input_ids=None, past_key_values=None, attention_mask=None, return_past_key_values=False, **kwargs
    ):
        """Returns (logits [B, T, V] in the backbone's dtype, loss or None, value [B, T] fp32) and the cache if asked.

        input_ids, attention_mask: [B, T] int64; other keywords go to the wrapped model. Values of a float64 head are
        float64.
        """
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        elif not return_past_key_values:
            # a cache that nobody reads costs memory, and transformers gives it up under checkpointing with a warning
            kwargs.setdefault("use_cache", False)
        output, hidden_states = run(self.pretrained_model, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        value = self.v_head(hidden_states.to(self.v_head.summary.weight.device)).squeeze(-1)
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        outputs = (output.logits, output.loss, value)
        return (*outputs, output.past_key_values) if return_past_key_values else outputs

    def generate(self, *args, **kwargs):
        """The wrapped model's `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """The wrapped model's `prepare_inputs_for_generation`."""
        return self.pretrained_model.prepare_inputs_for_generation(*args, **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        """Recomputes the layers in the backward pass, without reentrant autograd unless the keywords ask for it."""
        enable = _first_method(
            self.pretrained_model, "activation_checkpointing_enable", "gradient_checkpointing_enable"
        )
        enable(gradient_checkpointing_kwargs or {"use_reentrant": False})

    def gradient_checkpointing_disable(self):
        """Keeps all activations again."""
        _first_method(self.pretrained_model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()

    def enable_input_require_grads(self):
        """Gives the embeddings' output a gradient, which reentrant checkpointing needs above frozen embeddings."""
        self.pretrained_model.enable_input_require_grads()

    def compute_reward_score(self, input_ids, attention_mask=None, **kwargs):
        """Returns the reward adapter's scores [B, T, num_labels] without gradients; leaves the policy as it was."""
        if not self.supports_rm_adapter:
            raise ValueError("compute_reward_score: the model must be loaded with reward_adapter, got none")
        kwargs.update(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        with lora.active(self.pretrained_model, self.rm_adapter_name):
            _, hidden_states = run(self.pretrained_model, **kwargs)
            return self.score(hidden_states.to(self.score.weight))

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The wrapped model's entries without a prefix (none of a peft model) and the head's under "v_head.".

        Inside another module (DDP, FSDP) the names are the parameters' own, so that the outer state dict loads again.
        """
        if destination is not None or prefix:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        state = {} if self.is_peft_model else self.pretrained_model.state_dict(keep_vars=keep_vars)
        state.update({f"v_head.{name}": tensor for name, tensor in self.v_head.state_dict(keep_vars=keep_vars).items()})
        return state

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Loads what `state_dict` returns; changes nothing if a name (when strict) or a shape does not fit."""
        v_head, backbone = _split_state(state_dict)
        checkpoint.check_fits(type(self).__name__, self.state_dict(), {**backbone, **_prefixed(v_head)}, strict)
        loaded = self.v_head.load_state_dict(v_head, strict, assign)
        return loaded if self.is_peft_model else self.pretrained_model.load_state_dict(backbone, strict, assign)

    def save_pretrained(self, save_directory, **kwargs):
        """Writes config, weights with v_head.* in the same file(s), safetensors and JSON only, whole or not at all.

        state_dict: taken instead of the model's own (say, one gathered from all ranks). max_shard_size and other
        keywords go to the wrapped model. Only the main process writes, unless is_main_process says otherwise.
        A peft model gives adapter_config.json, adapter_model.safetensors, and model.safetensors with v_head.* alone.
        Raises ValueError for an adapter in the folder of a full model and the other way round.
        """
        v_head, backbone = _split_state(kwargs.pop("state_dict", None) or self.state_dict())
        if not kwargs.pop("safe_serialization", True):
            logger.warning(
                "save_pretrained writes safetensors although safe_serialization is False: pickle can run code"
            )
        push = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
        if not kwargs.pop("is_main_process", PartialState().is_main_process):
            return
        checkpoint.check_target(os.fspath(save_directory), self.is_peft_model)
        with checkpoint.staged(os.fspath(save_directory)) as staging:
            if self.is_peft_model:
                checkpoint.write_tensors(os.path.join(staging, checkpoint.WEIGHTS), _prefixed(v_head))
                lora.save(self.pretrained_model, staging, backbone, self.rm_adapter_name, kwargs)
            else:
                state_dict = {**backbone, **_prefixed(v_head)}
                self.pretrained_model.save_pretrained(staging, state_dict=state_dict, **kwargs)
        if push:
            self.push_to_hub(repo_id)

    def push_to_hub(self, *args, **kwargs):
        """The wrapped model's `push_to_hub`, with the value head inside."""
        self.pretrained_model.v_head = self.v_head
        try:
            return self.pretrained_model.push_to_hub(*args, **kwargs)
        finally:
            del self.pretrained_model.v_head


def _split_state(state_dict):
    """Returns the head's entries and the wrapped model's, both without the wrapper's own prefixes."""
    v_head = {name.removeprefix("v_head."): tensor for name, tensor in state_dict.items() if name.startswith("v_head.")}
    others = {name: tensor for name, tensor in state_dict.items() if not name.startswith(("v_head.", "score."))}
    return v_head, {name.removeprefix("pretrained_model."): tensor for name, tensor in others.items()}


def _prefixed(v_head):
    return {f"v_head.{name}": tensor for name, tensor in v_head.items()}


def _first_method(model, *names):
    """The first of these that the model has: transformers 5.23 renamed what 4.57 calls gradient checkpointing."""
    return next(getattr(model, name) for name in names if hasattr(model, name))
