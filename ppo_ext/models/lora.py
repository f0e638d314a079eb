"""Adapters for the value-head models. peft is imported only when an adapter is asked for or found."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from . import checkpoint, probe
from .modes import evaluating

SCORE_MODULES = ("score",)
KBIT_ARGUMENTS = ("use_gradient_checkpointing", "gradient_checkpointing_kwargs")
# initialisations of a LoRA adapter by which the base weights stay as they were loaded; PiSSA's and others' change them
KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
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
        return find_adapter_config_file(source, **hub_arguments(kwargs)) is not None
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
    config = import_peft(f"the adapter in {source}").PeftConfig.from_pretrained(source, **hub_arguments(kwargs))
    if not config.base_model_name_or_path:
        raise ValueError(
            f"checkpoint: {checkpoint.ADAPTER_CONFIG} in {source} must name its base_model_name_or_path, got "
            f"{config.base_model_name_or_path!r}; load the base model and give it to from_pretrained as base_model"
        )
    return config.base_model_name_or_path


def load(base_model: Any, source: str, is_trainable: bool, kwargs: Mapping[str, Any]) -> Any:
    """Returns the PeftModel made of a base model and the adapter in `source`."""
    peft = import_peft(f"the adapter in {source}")
    if os.path.isdir(source):
        _resize_to_adapter(base_model, os.path.join(source, checkpoint.ADAPTER_WEIGHTS))
    return peft.PeftModel.from_pretrained(base_model, source, is_trainable=is_trainable, **hub_arguments(kwargs))


def _resize_to_adapter(model: Any, path: str) -> None:
    """Gives the base model as many tokens as the embeddings that an adapter brings along have."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    for suffix in ("weight", "base_layer.weight", "modules_to_save.weight", "token_adapter.base_layer.weight"):
        wanted = f"base_model.model.{name}.{suffix}"
        found = checkpoint.read_tensors(path, wanted).get(wanted)
        if found is not None and len(found) != embedding.weight.shape[0]:
            model.resize_token_embeddings(len(found), mean_resizing=False)


def save(
    model: Any, directory: str, state_dict: dict[str, Any], rm_adapter_name: str | None, kwargs: dict[str, Any]
) -> None:
    """Writes the active adapter, the policy's, to the folder itself and every other one to a folder of its name inside.

    peft would put the one that is called "default" there. The reward adapter is left out: it is not part of the policy,
    and peft would not save its score.
    """
    policy = policy_adapter(model)
    names = kwargs.pop("selected_adapters", [name for name in model.peft_config if name != rm_adapter_name])
    if state_dict:
        kwargs["state_dict"] = state_dict
    for name in names:
        kwargs.setdefault("save_embedding_layers", True if _vocabulary_changed(model, name) else "auto")
        with tempfile.TemporaryDirectory(dir=directory) as written:
            model.save_pretrained(written, selected_adapters=[name], **kwargs)
            source = written if name == "default" else os.path.join(written, name)
            target = directory if name == policy else os.path.join(directory, name)
            if not checkpoint.tensor_names(os.path.join(source, checkpoint.ADAPTER_WEIGHTS)):
                raise ValueError(
                    f"save_pretrained: the peft model must have the weights of its adapter {name}, got none; after "
                    "merge_and_unload() or unload() set model.pretrained_model to what they return"
                )
            os.makedirs(target, exist_ok=True)
            for file in (entry for entry in os.scandir(source) if entry.is_file()):
                os.replace(file.path, os.path.join(target, file.name))


def _vocabulary_changed(model: Any, name: str) -> bool:
    """Whether the vocabulary is not that of the base checkpoint; then the adapter must bring the embeddings along."""
    base = model.peft_config[name].base_model_name_or_path
    try:
        config = type(model.get_base_model().config).from_pretrained(base) if base else None
    except (OSError, ValueError):
        return False  # not on this machine; peft asks the hub
    rows = model.get_input_embeddings().weight.shape[0]
    return config is not None and config.get_text_config().vocab_size != rows


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def refuse_injected(owner: str, model: Any) -> None:
    """Raises ValueError for adapters that are not those of a PeftModel: they would neither be switched off nor saved."""
    base = model.get_base_model() if is_peft_model(model) else model
    injected = getattr(base, "_hf_peft_config_loaded", False)
    if not injected and not is_peft_model(model) and "peft" in sys.modules:
        from peft.tuners.tuners_utils import BaseTunerLayer

        injected = any(isinstance(module, BaseTunerLayer) for module in base.modules())
    if injected:
        raise ValueError(
            f"{owner}: the model must be without adapters or a peft.PeftModel, got {type(base).__name__} with adapters "
            "that transformers or peft put inside; load the base model and give from_pretrained a peft_config, or give "
            "from_pretrained the adapter's folder with is_trainable=True"
        )


def wrap(model: Any, peft_config: Any, kbit_kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
    """Returns the model with a new adapter, and whether that has changed the base weights; a PeftModel stays as it is."""
    if is_peft_model(model):
        return model, False
    peft = import_peft("peft_config")
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = peft.prepare_model_for_kbit_training(model, **kbit_kwargs)
    with torch.no_grad():
        before = probe.logits(model)
        model = peft.get_peft_model(model, peft_config)
        if before is None or peft_config.is_prompt_learning:
            return model, False
        with adapters_off(model):
            after = probe.logits(model)
    return model, after is not None and not probe.same(before, after)


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
def adapters_off(model: Any, keep_gradients: bool = False) -> Iterator[None]:
    """Runs the block without the adapters. peft's own context would leave frozen adapters trainable.

    keep_gradients: within the block, adapter weights go on requiring gradients.
    """
    with _kept_requires_grad(model):
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        with model.disable_adapter():
            for parameter, flag in flags if keep_gradients else ():
                parameter.requires_grad_(flag)
            yield


def initialisation(model: Any) -> Any:
    """How the weights of the active adapter began, by its config; None if that does not say."""
    return getattr(model.peft_config[policy_adapter(model)], "init_lora_weights", None)


def policy_adapter(model: Any) -> str:
    """The name of the active adapter, which is the policy's."""
    active_adapters = model.active_adapters
    return active_adapters[0] if active_adapters else model.active_adapter


def check_policy_adapter(model: Any) -> None:
    """Raises ValueError unless one adapter is active: a folder holds one policy."""
    if len(model.active_adapters) > 1:
        raise ValueError(
            f"PPOTrainer: the policy must have one active adapter, got {', '.join(model.active_adapters)}; join them with "
            "add_weighted_adapter, or activate one with set_adapter"
        )


@contextlib.contextmanager
def active(model: Any, name: str | None) -> Iterator[None]:
    """Runs the block with another adapter, in eval mode and without gradients; restores adapter and modes afterwards."""
    policy_name = model.active_adapter
    with _kept_requires_grad(model), evaluating(model), torch.no_grad():
        model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(policy_name)
