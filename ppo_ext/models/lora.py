"""Adapters for the value-head models. peft is imported only when an adapter is asked for or found."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from . import checkpoint

SCORE_MODULES = ("score",)
KBIT_ARGUMENTS = ("use_gradient_checkpointing", "gradient_checkpointing_kwargs")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def import_peft(reason: str) -> Any:
    """Returns the peft module, or raises ImportError saying what needs it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"peft must be installed for {reason}: pip install peft ({error})") from None
    return peft


def is_peft_model(model: object) -> bool:
    """True for a PeftModel. Does not import peft: if there is such a model, peft has been imported already."""
    peft = sys.modules.get("peft")
    model = getattr(model, "_orig_mod", model)  # within a compiled one
    return peft is not None and isinstance(model, getattr(peft, "PeftModel", ()))


def check_arguments(peft_config: Any, reward_adapter: Any) -> None:
    """Raises TypeError unless peft_config is a PeftConfig or None and reward_adapter a path or None."""
    if peft_config is not None and not isinstance(peft_config, import_peft("peft_config").PeftConfig):
        raise TypeError(f"from_pretrained: peft_config must be a peft.PeftConfig, got {type(peft_config).__name__}")
    if reward_adapter is not None and not isinstance(reward_adapter, (str, os.PathLike)):
        raise TypeError(f"from_pretrained: reward_adapter must be a path, got {type(reward_adapter).__name__}")


def find_adapter(source: str, kwargs: Mapping[str, Any]) -> bool:
    """Returns whether a local folder or hub repository holds a peft adapter; checks the files of a local one."""
    if not os.path.isdir(source):
        return find_adapter_config_file(source, **_hub_arguments(kwargs)) is not None
    config_path = os.path.join(source, checkpoint.ADAPTER_CONFIG)
    if not os.path.exists(config_path):
        return False
    checkpoint.read_json(config_path)
    if not checkpoint.weight_files(source, checkpoint.ADAPTER_WEIGHTS):
        missing = os.path.join(source, checkpoint.ADAPTER_WEIGHTS)
        raise ValueError(f"checkpoint: {missing} must exist beside {checkpoint.ADAPTER_CONFIG}, got no such file")
    return True


def base_model_of(source: str, kwargs: Mapping[str, Any]) -> str:
    """Returns the base model's path or id from an adapter's config; raises ValueError if it names none."""
    config = import_peft(f"the adapter in {source}").PeftConfig.from_pretrained(source, **_hub_arguments(kwargs))
    if not config.base_model_name_or_path:
        raise ValueError(
            f"checkpoint: {checkpoint.ADAPTER_CONFIG} in {source} must name its base_model_name_or_path, got "
            f"{config.base_model_name_or_path!r}; load the base model and give from_pretrained a peft.PeftModel"
        )
    return config.base_model_name_or_path


def load(base_model: Any, source: str, is_trainable: bool, kwargs: Mapping[str, Any]) -> Any:
    """Returns the PeftModel made of a base model and the adapter in `source`."""
    peft = import_peft(f"the adapter in {source}")
    return peft.PeftModel.from_pretrained(base_model, source, is_trainable=is_trainable, **_hub_arguments(kwargs))


def save(
    model: Any, directory: str, state_dict: dict[str, Any], rm_adapter_name: str | None, kwargs: dict[str, Any]
) -> None:
    """Writes all adapters except the reward adapter: it is not part of the policy, and peft would not save its score."""
    kwargs.setdefault("selected_adapters", [name for name in model.peft_config if name != rm_adapter_name])
    if state_dict:
        kwargs["state_dict"] = state_dict
    model.save_pretrained(directory, **kwargs)


def _hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def wrap(model: Any, peft_config: Any, kbit_kwargs: Mapping[str, Any]) -> Any:
    """Returns the model with a new adapter; a PeftModel is returned as it is."""
    if is_peft_model(model):
        return model
    peft = import_peft("peft_config")
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = peft.prepare_model_for_kbit_training(model, **kbit_kwargs)
    return peft.get_peft_model(model, peft_config)


def refuse_prompt_learning(model: Any) -> None:
    """Raises ValueError for prompt and prefix tuning: their virtual tokens would shift logits relative to the labels."""
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        kind = type(model.active_peft_config).__name__
        raise ValueError(f"from_pretrained: peft_config must not be a prompt learning method, got {kind}")


def add_reward_adapter(model: Any, directory: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Loads a second, frozen adapter and its linear score head; returns the arguments of `PreTrainedModelWrapper` for it.

    directory: local folder with adapter_config.json and adapter_model.safetensors, which also holds score.weight
    [num_labels, H] and optionally score.bias.
    Raises: ValueError if a file or the score head is missing or does not fit the model.
    """
    directory = os.fspath(directory)
    if not is_peft_model(model):
        raise ValueError(f"from_pretrained: reward_adapter must come with a peft model, got {type(model).__name__}")
    if name in model.peft_config:
        raise ValueError(f"from_pretrained: reward_adapter_name must be new, got {name!r}, which the model already has")
    if not os.path.isdir(directory) or not find_adapter(directory, {}):
        raise ValueError(f"from_pretrained: reward_adapter must be a local folder with an adapter, got {directory}")
    score = _load_score(directory, model)
    training = model.training
    with _kept_requires_grad(model):
        model.load_adapter(directory, name, is_trainable=False)
    model.train(training)
    return {"score_module": score, "supports_rm_adapter": True, "rm_adapter_name": name}


def _load_score(directory: str, model: Any) -> nn.Linear:
    path = os.path.join(directory, checkpoint.ADAPTER_WEIGHTS)
    found = {}
    for name, tensor in checkpoint.read_tensors(path).items():
        parts = name.split(".")
        if any(module in parts for module in SCORE_MODULES) and parts[-1] in ("weight", "bias"):
            found[parts[-1]] = tensor
    if "weight" not in found or found["weight"].dim() != 2:
        raise ValueError(f"from_pretrained: {path} must hold score.weight of shape [num_labels, hidden_size], got none")
    num_labels, hidden_size = found["weight"].shape
    expected = model.get_input_embeddings().weight
    score = nn.Linear(hidden_size, num_labels, bias="bias" in found, device=expected.device, dtype=model.dtype)
    checkpoint.check_fits(f"from_pretrained: {path}", score.state_dict(), found)
    score.load_state_dict(found)
    return score.requires_grad_(False)


@contextlib.contextmanager
def _kept_requires_grad(model: nn.Module) -> Iterator[None]:
    """Restores every requires_grad flag after the block: peft's set_adapter makes the adapter it activates trainable."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, False))


@contextlib.contextmanager
def active(model: Any, name: str | None) -> Iterator[None]:
    """Runs the block with another adapter, in eval mode and without gradients; restores adapter and modes afterwards."""
    modes = {module: module.training for module in model.modules()}
    policy_name = model.active_adapter
    with _kept_requires_grad(model), torch.no_grad():
        model.set_adapter(name)
        model.eval()
        try:
            yield
        finally:
            model.set_adapter(policy_name)
            for module, training in modes.items():
                module.training = training
