"""Saving and loading the state of a run, so that a resumed run has the same bits: one safetensors file, no pickle."""

import json
import os
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from ..models import checkpoint
from ..models.saving import plain_name
from .base import TrainerBase

STATE_FILE = "trainer_state.safetensors"
_COUNTERS = ("current_step", "compare_step", "skipped_minibatches")
_MOMENTS = ("mean", "std", "var", "count")


class ResumeMixin(TrainerBase):
    """`PPOTrainer.save_run` and `load_run`.

    They are not called save_state and load_state: in a class that inherits from PPOTrainer and transformers.Trainer they
    would hide `Trainer.save_state()`, which takes no argument and writes another file.
    """

    def save_run(self, directory: str | os.PathLike[str]) -> None:
        """Write everything that the next `step` depends on to a folder; a killed save leaves the old file whole.

        These are the trained weights, the optimizer, the learning rate schedule, the KL coefficient, the running moments
        of the scores, and the state of every random generator of every process. Not included are frozen weights, the
        reference, and the position of a dataloader. All processes must call it; the main one writes.

        Raises: ValueError under FSDP or DeepSpeed, where no process has whole weights (use accelerator.save_state), and
        for a schedule whose state is not JSON.
        """
        self._refuse_sharding("save_run")
        tensors: dict[str, torch.Tensor] = {f"model.{name}": parameter for name, parameter in self._trained().items()}
        optimizer, groups = _split_optimizer(self.optimizer.state_dict())
        tensors.update(optimizer)
        tensors.update({f"random.{name}": self._gather_rows(state) for name, state in _random_state().items()})
        tensors["highest_reward"] = getattr(self, "highest_reward", torch.tensor(-float("inf"))).reshape(1)
        tensors["state"] = _to_bytes(
            {
                "optimizer": groups,
                "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                "kl_coef": self.kl_ctl.value,
                "running": {name: getattr(self.running, name) for name in _MOMENTS},
                **{name: getattr(self, name) for name in _COUNTERS},
            }
        )
        if self.accelerator.is_main_process:
            os.makedirs(directory, exist_ok=True)
            checkpoint.write_tensors(os.path.join(directory, STATE_FILE), tensors)
        self.accelerator.wait_for_everyone()

    def load_run(self, directory: str | os.PathLike[str]) -> None:
        """Continue from what `save_run` wrote, in a trainer that is constructed in the same way.

        Raises: ValueError for a damaged file, another model, or another number of processes, before anything changes.
        """
        self._refuse_sharding("load_run")
        path = os.path.join(directory, STATE_FILE)
        tensors = checkpoint.read_tensors(path)
        if "state" not in tensors or "highest_reward" not in tensors:
            raise ValueError(f"load_run: {path} must be written by save_run, got {len(tensors)} other tensors")
        state = json.loads(tensors["state"].numpy().tobytes())
        trained = self._trained()
        saved = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
        checkpoint.check_fits("load_run", trained, saved)
        rows = len(tensors["random.torch"])
        if rows != self.accelerator.num_processes:
            raise ValueError(f"load_run: the number of processes must be {rows}, got {self.accelerator.num_processes}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])
        self.optimizer.load_state_dict(_join_optimizer(tensors, state["optimizer"]))
        for loaded, name in ((self.lr_scheduler, "lr_scheduler"), (self.accelerator.scaler, "scaler")):
            if loaded is not None and state[name] is not None:
                loaded.load_state_dict(state[name])
        self.kl_ctl.value = state["kl_coef"]
        highest_reward = tensors["highest_reward"].reshape(()).to(self.current_device)
        if hasattr(self, "highest_reward") or highest_reward > -float("inf"):
            self.highest_reward = highest_reward
        for name in _MOMENTS:
            setattr(self.running, name, state["running"][name])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        row = self.accelerator.process_index
        _set_random_state(
            {name.removeprefix("random."): x[row] for name, x in tensors.items() if name.startswith("random.")}
        )

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        model = self.accelerator.unwrap_model(self.model)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {plain_name(name): parameter for name, parameter in trained.items()}

    def _gather_rows(self, state: torch.Tensor) -> torch.Tensor:
        """[n] of every process -> [processes, n]."""
        gathered = (
            self.accelerator.gather(state[None].to(self.accelerator.device)) if self.is_distributed else state[None]
        )
        return gathered.cpu()

    def _refuse_sharding(self, method: str) -> None:
        if self.accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
            raise ValueError(
                f"{method}: every process must hold whole weights, got {self.accelerator.distributed_type}; "
                "use trainer.accelerator.save_state and load_state"
            )


def _split_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors under "optimizer.<parameter>.<name>", and the rest, which JSON can hold."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in state_dict["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, {"groups": state_dict["param_groups"], "numbers": numbers}


def _join_optimizer(tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's state dict from what `_split_optimizer` returned."""
    state: dict[int, dict[str, Any]] = {}
    found = {name.removeprefix("optimizer."): x for name, x in tensors.items() if name.startswith("optimizer.")}
    for key, value in {**found, **rest["numbers"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["groups"]}


def _to_bytes(state: Mapping[str, Any]) -> torch.Tensor:
    try:
        text = json.dumps(state)
    except TypeError as error:
        raise ValueError(
            f"save_run: optimizer and lr_scheduler must have a state that JSON can hold, got {error}"
        ) from None
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _random_state() -> dict[str, torch.Tensor]:
    """The states of the random generators of Python, numpy and torch, each as a 1-D tensor."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": torch.tensor([*words, 0 if gauss is None else 1], dtype=torch.int64),
        "python_gauss": torch.tensor([gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*cast(Any, keys).tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: Mapping[str, torch.Tensor]) -> None:
    *words, has_gauss = states["python"].tolist()
    random.setstate((3, tuple(words), states["python_gauss"].item() if has_gauss else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    torch.set_rng_state(states["torch"].contiguous())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].contiguous())
