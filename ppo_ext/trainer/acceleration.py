"""What the trainer sets up with accelerate: the accelerator, mixed precision, DeepSpeed, trackers."""

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from . import sharding
from .config import PPOConfig, as_dict

_CASTING: "weakref.WeakSet[Callable[..., Any]]" = weakref.WeakSet()  # what `keep_logits_dtype` has made


def make_accelerator(config: PPOConfig) -> Accelerator:
    """The accelerator that the config describes; enters the number of processes into the config."""
    # without sync_with_dataloader=False, accelerate ends an accumulation early in the last batch of every dataloader pass
    accumulation = GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False)
    accelerator = Accelerator(
        log_with=config.log_with,
        gradient_accumulation_plugin=accumulation,
        project_config=ProjectConfiguration(**as_dict("project_kwargs", config.project_kwargs)),
        **as_dict("accelerator_kwargs", config.accelerator_kwargs),
    )
    sharding.check_accelerator(accelerator, as_dict("accelerator_kwargs", config.accelerator_kwargs))
    if accelerator.dataloader_config.dispatch_batches is None:
        # else the main process reads a streaming dataset for all, and accelerate can cut batches of tensors only
        accelerator.dataloader_config.dispatch_batches = False
    processes = accelerator.num_processes
    config.world_size = processes
    config.global_backward_batch_size = config.mini_batch_size * config.gradient_accumulation_steps * processes
    config.global_batch_size = config.batch_size * processes
    config.check()  # what depends on the number of processes
    return accelerator


def keep_logits_dtype(accelerator: Accelerator, model: Any) -> None:
    """Replaces the forward that accelerate wrapped for mixed precision by one that only turns autocast on.

    accelerate's also copies every output to float32. The ops take half-precision logits as they are, so that copy of
    the logits would be memory for nothing.
    """
    if model is None:
        return
    model = accelerator.unwrap_model(model)
    model = getattr(model, "_orig_mod", model)  # within a compiled one
    forward = vars(model).get("_original_forward")  # set by accelerate where it wrapped one
    if forward is None or accelerator.mixed_precision not in ("fp16", "bf16"):
        return

    @functools.wraps(forward)  # accelerate finds the plain forward again by __wrapped__
    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    _CASTING.add(autocast_forward)
    model.forward = autocast_forward


def only_casts(forward: Callable[..., Any]) -> bool:
    """Whether a forward is one that `keep_logits_dtype` has made."""
    return forward in _CASTING


def clip_in_deepspeed(accelerator: Accelerator, max_grad_norm: float | None) -> None:
    """DeepSpeed makes the update within the backward pass, so it has to clip. With None its own configuration decides."""
    if accelerator.distributed_type == "DEEPSPEED" and max_grad_norm is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = max_grad_norm


def deepspeed_engine(accelerator: Accelerator, model: torch.nn.Module) -> Any:
    """A model that is only run forward, as a DeepSpeed engine: sharded under ZeRO-3, else whole on every rank."""
    import deepspeed

    settings = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    if settings["zero_optimization"]["stage"] != 3:
        settings["zero_optimization"]["stage"] = 0
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()  # an engine's eval() returns nothing
    return engine


def start_trackers(accelerator: Accelerator, config: PPOConfig) -> None:
    """Starts the trackers of `config.log_with` with all settings; tensorboard takes flat and plain ones only."""
    names = [getattr(tracker, "value", getattr(tracker, "name", None)) for tracker in accelerator.log_with]
    accelerator.init_trackers(
        config.tracker_project_name,
        init_kwargs=config.tracker_kwargs,
        config=config.to_plain_dict() if "tensorboard" in names else {"trl_ppo_trainer_config": config.to_dict()},
    )
