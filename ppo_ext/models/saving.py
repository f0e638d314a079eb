"""State dicts and files of a value-head model: one set of names for backbone and head."""

import logging
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from accelerate import PartialState
from torch import nn

from . import checkpoint, lora
from .staging import staged
from .value_head import ValueHead

logger = logging.getLogger(__name__)


class SavingMixin(nn.Module):
    """`PreTrainedModelWrapper.state_dict`, `load_state_dict`, `save_pretrained` and `push_to_hub`."""

    pretrained_model: Any  # a transformers PreTrainedModel or a PeftModel
    v_head: ValueHead
    rm_adapter_name: str | None  # of the reward adapter, which is not saved

    @property
    def is_peft_model(self) -> bool:
        """Whether the wrapped model is a PeftModel; no longer so once it is replaced by what merge_and_unload() returns."""
        return lora.is_peft_model(self.pretrained_model)

    def state_dict(  # type: ignore[override]  # nn.Module declares it by overloads
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The wrapped model's entries without a prefix, and the head's under "v_head."; of a peft model only the head's.

        Inside another module (DDP, FSDP) the names are those of the parameters, so that the outer module can load its
        own state dict.
        """
        if destination is not None or prefix:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        backbone = {} if self.is_peft_model else self.pretrained_model.state_dict(keep_vars=keep_vars)
        state = {plain_name(name): tensor for name, tensor in backbone.items()}
        state.update({f"v_head.{name}": tensor for name, tensor in self.v_head.state_dict(keep_vars=keep_vars).items()})
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` returns. Changes nothing if a shape or, with strict, a name does not fit."""
        v_head, backbone = split_state(state_dict)
        checkpoint.check_fits(type(self).__name__, self.state_dict(), {**backbone, **prefixed(v_head)}, strict)
        loaded = self.v_head.load_state_dict(v_head, strict, assign)
        if self.is_peft_model:
            return loaded
        names = {plain_name(name): name for name in self.pretrained_model.state_dict()}
        state = {names.get(name, name): tensor for name, tensor in backbone.items()}
        return self.pretrained_model.load_state_dict(state, strict, assign)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes config and weights, v_head.* in the same file(s), as safetensors and JSON; see `staging`.

        A peft model is saved as adapter_config.json, adapter_model.safetensors, and model.safetensors with v_head.* only.

        Args:
            kwargs: state_dict replaces the model's own, for example by one gathered from all ranks. is_main_process
                decides whether this process writes; by default the main one does. max_shard_size and others go to the
                wrapped model.

        Raises: ValueError for an adapter in the folder of a full model and for a full model in that of an adapter.
        """
        state = kwargs.pop("state_dict", None)
        v_head, backbone = split_state(self.state_dict() if state is None else state)
        if not kwargs.pop("safe_serialization", True):
            logger.warning(
                "save_pretrained writes safetensors although safe_serialization is False: pickle can run code"
            )
        push = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
        if not kwargs.pop("is_main_process", PartialState().is_main_process):
            return
        checkpoint.check_target(os.fspath(save_directory), self.is_peft_model)
        with staged(os.fspath(save_directory)) as staging:
            if self.is_peft_model:
                if v_head:
                    checkpoint.write_tensors(os.path.join(staging, checkpoint.WEIGHTS), prefixed(v_head))
                lora.save(self.pretrained_model, staging, backbone, self.rm_adapter_name, kwargs)
            else:
                state_dict = {**backbone, **prefixed(v_head)}
                self.pretrained_model.save_pretrained(staging, state_dict=state_dict, **kwargs)
        if push:
            self.push_to_hub(repo_id)

    def rehearse_saving(self) -> None:
        """Raises ValueError for what `save_pretrained` would refuse; writes only configs, to a temporary folder."""
        model, owner = self.pretrained_model, type(self).__name__
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and not self.is_peft_model:
            method = quantizer.quantization_config.quant_method
            raise ValueError(
                f"{owner}: a model without adapters must not be quantized, since it can be neither trained nor saved with "
                f"its value head, got {getattr(method, 'value', method)}; give from_pretrained a peft_config"
            )
        configs = list(model.peft_config.values()) if self.is_peft_model else [model.config]
        if not self.is_peft_model and model.can_generate():
            configs.append(model.generation_config)
        for config in configs:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    config.save_pretrained(folder)
                except Exception as error:
                    reason = " ".join(str(error).split())
                    raise ValueError(
                        f"{owner}: {type(config).__name__} must be one that save_pretrained can write, got {reason}"
                    ) from error

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's `push_to_hub`, with the value head inside."""
        self.pretrained_model.v_head = self.v_head
        try:
            return self.pretrained_model.push_to_hub(*args, **kwargs)
        finally:
            del self.pretrained_model.v_head


def plain_name(name: str) -> str:
    """The name of a parameter without the module that torch.compile puts around a model or a layer."""
    return name.replace("_orig_mod.", "")


def split_state(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the head's entries and the wrapped model's, both without the prefixes that wrappers add."""
    state_dict = {plain_name(name): tensor for name, tensor in state_dict.items()}
    v_head = {name.removeprefix("v_head."): tensor for name, tensor in state_dict.items() if name.startswith("v_head.")}
    others = {name: tensor for name, tensor in state_dict.items() if not name.startswith(("v_head.", "score."))}
    return v_head, {name.removeprefix("pretrained_model."): tensor for name, tensor in others.items()}


def prefixed(v_head: Mapping[str, Any]) -> dict[str, Any]:
    return {f"v_head.{name}": tensor for name, tensor in v_head.items()}
