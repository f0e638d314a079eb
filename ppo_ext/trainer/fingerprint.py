"""What a resumed run must have in common with the saved one, apart from the state that is loaded."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..models.saving import plain_name
from .config import PPOConfig
from .plain_data import as_bytes

_CHANGE_NO_NUMBER = {  # fields of PPOConfig
    *("exp_name", "seed", "steps", "total_ppo_epochs", "task_name", "model_name", "query_dataset", "reward_model"),
    *("log_with", "tracker_project_name", "tracker_kwargs", "project_kwargs", "accelerator_kwargs"),
    *("dataset_num_proc", "remove_unused_columns", "push_to_hub_if_best_kwargs", "compare_steps"),
    *("optimize_device_cache", "optimize_cuda_cache", "forward_batch_size"),
}
# of a transformers or peft config: where it came from, who wrote it, how it is stored
_ORIGIN = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"} | {
    *("base_model_name_or_path", "peft_version", "revision", "inference_mode", "auto_mapping"),
}
_CHUNK = 1 << 24  # bytes
_MULTIPLIER = -7046029254386353131  # odd, so that multiplication by it mod 2^64 loses nothing; 2^64 / golden ratio


def fingerprint(trainer: Any) -> dict[str, Any]:
    """Names, settings and checksums, as JSON. `first_difference` compares two of them.

    Everything frozen is read: a checksum of samples would miss another base model that was fine-tuned in one layer.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    pretrained_model = getattr(model.pretrained_model, "_orig_mod", model.pretrained_model)
    base = pretrained_model.get_base_model() if hasattr(pretrained_model, "get_base_model") else pretrained_model
    adapters = getattr(pretrained_model, "peft_config", None) or {}
    reference = None if trainer.ref_model is None else trainer.accelerator.unwrap_model(trainer.ref_model)
    found = {
        "the model's class": class_name(base),
        "the model's config": _settings(base.config),
        "the attention": getattr(base.config, "_attn_implementation", None),
        "the adapters": {name: _settings(config) for name, config in adapters.items()},
        "the device": trainer.accelerator.device.type,
        "mixed precision": str(trainer.accelerator.mixed_precision),
        "the number of processes": trainer.accelerator.num_processes,
        "the tokenizer's padding_side": trainer.tokenizer.padding_side,
        "PPOConfig": ppo_settings(trainer.config),
        "the critic": None if trainer.critic is None else _critic(trainer.accelerator.unwrap_model(trainer.critic)),
        "the optimizer": class_name(inner(trainer.optimizer, "optimizer")),
        "the optimizer's groups": _groups(trainer.optimizer, models_of(trainer)),
        "lr_scheduler": class_name(inner(trainer.lr_scheduler, "scheduler")),
        "kl_ctl": class_name(trainer.kl_ctl),
        **_tensors(model),
        "the checksum of the reference": None if reference is None else checksum(p for _, p in named(reference)),
    }
    return json.loads(json.dumps(found))


def _critic(critic: Any) -> dict[str, Any]:
    model = critic.backbone[0]
    return {"class": class_name(critic.model), "config": _settings(model.config), **_tensors(critic)}


def _tensors(model: nn.Module) -> dict[str, Any]:
    return {
        "the trained weights": {name: _form(p) for name, p in named(model) if p.requires_grad},
        "the buffers": {plain_name(name): _form(buffer) for name, buffer in model.named_buffers()},
        "the checksum of the frozen weights": checksum(p for _, p in named(model) if not p.requires_grad),
    }


def models_of(trainer: Any) -> dict[str, nn.Module]:
    """What is trained, by the beginning of its names in a saved run."""
    found = {"model": trainer.model, "critic": trainer.critic}
    return {name: trainer.accelerator.unwrap_model(model) for name, model in found.items() if model is not None}


def first_difference(
    saved: Mapping[str, Any], current: Mapping[str, Any], path: str = ""
) -> tuple[str, Any, Any] | None:
    """(name, saved value, current value) of the first entry that differs; None if all are the same."""
    for key in [*saved, *(key for key in current if key not in saved)]:
        name = f"{path}.{key}" if path else key
        a, b = saved.get(key), current.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            difference = first_difference(a, b, name)
            if difference is not None:
                return difference
        elif a != b:
            return name, a, b
    return None


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model by their names without torch.compile's wrapper."""
    return ((plain_name(name), parameter) for name, parameter in model.named_parameters())


def inner(wrapped: Any, attribute: str) -> Any:
    """What accelerate has wrapped: a torch optimizer or schedule."""
    return getattr(wrapped, attribute, wrapped) if type(wrapped).__module__.startswith("accelerate.") else wrapped


def class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def ppo_settings(config: PPOConfig) -> dict[str, Any]:
    """The fields of a PPOConfig that decide the numbers of a step."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in _CHANGE_NO_NUMBER]
    return json.loads(json.dumps({name: getattr(config, name) for name in names}, default=_number))


def checksum(tensors: Iterator[torch.Tensor]) -> str:
    """64 bits of all bytes of some tensors, in hexadecimal digits, computed where the tensors are.

        sum of words[i] * (MULTIPLIER * (2 i + 1)) mod 2^64, over 64-bit words; from one tensor to the next, times MULTIPLIER

    Any change of a single word changes it, since the factors are odd. It guards against accidents and not against forgery.
    """
    total = 0
    for tensor in tensors:
        data = as_bytes(tensor)
        own = torch.zeros((), dtype=torch.int64, device=data.device)
        for start in range(0, len(data), _CHUNK):
            part = data[start : start + _CHUNK]
            words = nn.functional.pad(part, (0, -len(part) % 8)).view(torch.int64)
            first = start // 8
            factors = torch.arange(2 * first + 1, 2 * (first + len(words)) + 1, 2, device=data.device) * _MULTIPLIER
            own += (words * factors).sum()
        total = (total * _MULTIPLIER + int(own.item()) + len(data)) % 2**64
    return f"{total:016x}"


def _settings(config: Any) -> dict[str, Any]:
    return _without_origin(json.loads(json.dumps(config.to_dict(), default=_number)))


def _without_origin(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_origin(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_origin(item) for key, item in value.items() if key not in _ORIGIN}


def _number(value: Any) -> Any:
    """What JSON does not know: sets sorted, numpy's numbers as Python's, the rest as text."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.item() if hasattr(value, "item") else str(value)


def _groups(optimizer: Any, models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The names of the parameters of each group, in the optimizer's order, by which it stores its state."""
    names = {id(p): name for name, p in named(models["model"])}
    if "critic" in models:
        names |= {id(p): f"critic.{name}" for name, p in named(models["critic"])}
    groups: dict[str, Any] = {"number": len(optimizer.param_groups)}
    for i, group in enumerate(optimizer.param_groups):
        own = [names.get(id(p), f"another of {_form(p)}") for p in group["params"]]
        groups[str(i)] = {"size": len(own), **{str(j): name for j, name in enumerate(own)}}
    return groups


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
