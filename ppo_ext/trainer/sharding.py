"""Weights that are spread over the processes: FSDP2 through accelerate's plugin, and what is refused."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from .callers import warn


def is_sharded(accelerator: Any) -> bool:
    """Whether no process holds whole weights, or whole gradients."""
    return accelerator.distributed_type in ("FSDP", "DEEPSPEED")


def check_accelerator(accelerator: Any, settings: dict[str, Any]) -> None:
    """ValueError for FSDP of version 1 and for weights that one process alone has loaded.

    Warns where accelerate leaves the plugin out, as on a CPU. settings: the keyword arguments of the Accelerator.
    """
    if accelerator.distributed_type == "FSDP":
        if not accelerator.state.is_fsdp2:
            raise ValueError(
                "PPOTrainer: fsdp_version must be 2, got 1; give accelerate launch --fsdp_version 2, or the plugin "
                "fsdp_version=2"
            )
        if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "PPOTrainer: fsdp_cpu_ram_efficient_loading must be false, got true; accelerate would look for the weights "
                "under other names than those of a model with a value head"
            )
    elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or settings.get("fsdp_plugin") is not None:
        warn(
            f"PPOTrainer: accelerate leaves FSDP out on {accelerator.device.type}, and every process holds all weights "
            f"({accelerator.distributed_type.value})",
        )


def check_model(model: Any) -> None:
    """ValueError for a model that is split before the trainer gets it, such as by tp_plan."""
    split = next((name for name, p in model.named_parameters() if hasattr(p, "full_tensor")), None)
    if split is not None:
        raise ValueError(
            f"PPOTrainer: model must be whole, got {split} as a DTensor; load it without tp_plan and shard it with "
            "accelerate's FSDP2 (for a head that is split by columns, the ops take group=)"
        )


def check_critic(accelerator: Any, critic_model: Any) -> None:
    """ValueError for a critic where weights are spread over processes, and for one that is split already."""
    if is_sharded(accelerator):
        raise ValueError(
            "PPOTrainer: critic_model must be None where weights are spread over the processes, which accelerate does for "
            f"one model only, got {type(critic_model).__name__} with {accelerator.distributed_type.value}"
        )
    check_model(critic_model)


def prepare_reference(accelerator: Any, model: torch.nn.Module) -> Any:
    """A model that is only run forward, sharded as the plugin says; accelerate itself asks for an optimizer with it."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model).eval()


def _units(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]


@contextlib.contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Within the block every process holds all weights: gathered once, and not for each token of a response.

    So the processes may write responses of different lengths.
    """
    units = _units(model)
    groups = [group for unit in units if (group := unit._get_fsdp_state()._fsdp_param_group) is not None]
    kept = [group.post_forward_mesh_info for group in groups]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for group, before in zip(groups, kept, strict=True):
            group.post_forward_mesh_info = before
        for unit in units:
            unit.reshard()


def whole_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """All tensors of a model on the CPU, by the names of nn.Module. All processes must call it. Tied weights stay tied."""
    found: dict[int, torch.Tensor] = {}
    result = {}
    tensors: dict[str, Any] = torch.nn.Module.state_dict(model, destination={}, keep_vars=True)
    for name, tensor in tensors.items():
        if id(tensor) not in found:
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            whole = whole.wait() if hasattr(whole, "wait") else whole  # an asynchronous result
            found[id(tensor)] = whole.detach().cpu()
        result[name] = found[id(tensor)]
    return result
