"""Saving and loading the state of a run, so that a resumed run has the same bits: one safetensors file, no pickle."""

import copy
import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..models import checkpoint
from ..models.saving import plain_name
from .agreement import gather
from .base import TrainerBase
from .fingerprint import fingerprint, first_difference, inner, models_of, named
from .interruption import InterruptionMixin
from .plain_data import decode, difference, encode
from .processes import ProcessesMixin
from .random_state import check_random_state, random_state, set_random_state
from .sharding import is_sharded

STATE_FILE = "trainer_state.safetensors"
_COUNTERS = ("current_step", "compare_step", "skipped_minibatches", "critic_steps")
_MOMENTS = ("mean", "std", "var", "count")


class SavedRun(NamedTuple):
    """What a file of `save_run` holds."""

    path: str
    tensors: Mapping[str, torch.Tensor]  # trained weights and buffers, by the names of `_tensors`, and others
    random: Mapping[str, torch.Tensor]  # of every process, [processes, n]
    state: dict[str, Any]  # optimizer, schedule, ...; see `ResumeMixin._state`
    fingerprint: dict[str, Any]


class ResumeMixin(InterruptionMixin, ProcessesMixin, TrainerBase):
    """`PPOTrainer.save_run` and `load_run`.

    They are not called save_state and load_state: in a class that inherits from PPOTrainer and transformers.Trainer they
    would hide `Trainer.save_state()`, which takes no argument and writes another file.
    """

    def save_run(self, directory: str | os.PathLike[str]) -> None:
        """Write everything that the next `step` depends on to a folder; a killed save leaves the old file whole.

        These are the trained weights and the buffers of policy and critic, the optimizer, the learning rate schedule, the
        KL controller, the running moments of the scores, and the state of every random generator of every process. Not
        included are frozen weights and the reference, of which the file has checksums, and the position of a dataloader.
        All processes must call it; the main one writes, and none goes on before the file is whole.

        Raises: ValueError under FSDP or DeepSpeed, where no process has whole weights (use accelerator.save_state); for a
        state that would not come back equal, such as a function in a schedule; and for a learning rate, KL coefficient
        or running moment that is not finite. OSError that names the folder if the disk is full.
        """
        self._refuse_sharding("save_run")

        def own_random_state() -> dict[str, torch.Tensor]:
            self._discard_unfinished_step()
            return random_state()

        states = self._alike("save_run", own_random_state)
        tensors = self._tensors()
        tensors.update({f"random.{name}": self._gather_rows(state) for name, state in states.items()})

        def write() -> None:
            state = self._state()
            _check_numbers("save_run", state)
            _check_optimizer(inner(self.optimizer, "optimizer"), state["optimizer"])
            encoded = {name: encode("save_run", value, name, tensors) for name, value in state.items()}
            text = json.dumps({"fingerprint": fingerprint(self), "state": encoded})
            tensors["state"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            if self.accelerator.is_main_process:
                os.makedirs(directory, exist_ok=True)
                checkpoint.write_tensors(os.path.join(directory, STATE_FILE), tensors, digest=True)

        self._alike("save_run", write)

    def load_run(self, directory: str | os.PathLike[str]) -> None:
        """Continue from what `save_run` wrote, in a trainer that is constructed in the same way.

        Raises: ValueError that names the file, before anything changes: the file is damaged; model, adapter, frozen
        weights, reference, optimizer, schedule, device, number of processes, or a field of PPOConfig that decides numbers
        are others than they were.
        """
        self._refuse_sharding("load_run")
        path = os.path.join(directory, STATE_FILE)
        run = self._alike("load_run", lambda: self._read(path))
        self._discard_unfinished_step(always=True)
        self._load_optimizer(run)
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(run.tensors[name])
        for name, value in run.state["kl_ctl"].items():
            setattr(self.kl_ctl, name, value)
        for name in _MOMENTS:
            setattr(self.running, name, run.state["running"][name])
        for name in _COUNTERS:
            setattr(self, name, run.state[name])
        if run.state["highest_reward"] is not None:
            self.highest_reward = run.state["highest_reward"].to(self.current_device)
        set_random_state({name: rows[self.accelerator.process_index] for name, rows in run.random.items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The trained weights and the buffers of the policy and of the critic."""
        found: dict[str, torch.Tensor] = {}
        for part, model in models_of(self).items():
            found |= {f"{part}.{name}": p for name, p in named(model) if p.requires_grad}
            found |= {f"{part}_buffer.{plain_name(name)}": buffer for name, buffer in model.named_buffers()}
        return found

    def _state(self) -> dict[str, Any]:
        """What changes from step to step beside the weights."""
        scaler, scheduler = self.accelerator.scaler, self.lr_scheduler
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "kl_ctl": {**vars(self.kl_ctl), "value": self.kl_ctl.value},
            "running": {name: getattr(self.running, name) for name in _MOMENTS},
            "highest_reward": getattr(self, "highest_reward", None),
            **{name: getattr(self, name) for name in _COUNTERS},
        }

    def _read(self, path: str) -> SavedRun:
        """The file, checked: it is what was written, and it belongs to this trainer. Changes nothing."""
        run = _parse(path)
        found = first_difference(run.fingerprint, fingerprint(self))
        if found is not None:
            name, saved, current = found
            remedy = "; set it before load_run, and to another value after it" if name.startswith("PPOConfig") else ""
            raise ValueError(f"load_run: {name} must be {saved!s:.200} as in {path}, got {current!s:.200}{remedy}")
        _check_numbers(f"load_run: {path}", run.state)
        row = self.accelerator.process_index
        check_random_state(f"load_run: {path}", {name: rows[row] for name, rows in run.random.items()})
        return run

    def _load_optimizer(self, run: SavedRun) -> None:
        """Loads optimizer, schedule and scaler; if one of them refuses, on any process, all get back what they had."""
        owners = {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler, "scaler": self.accelerator.scaler}
        old = {name: copy.copy(owner.state_dict()) for name, owner in owners.items() if owner is not None}

        def load() -> None:
            for name in old:
                try:
                    owners[name].load_state_dict(run.state[name])
                except Exception as error:
                    raise ValueError(f"load_run: {name} must take its state in {run.path}, got {error}") from error

        try:
            self._alike("load_run", load)
        except ValueError:
            for name, state in old.items():
                owners[name].load_state_dict(state)
            raise

    def _gather_rows(self, state: torch.Tensor) -> torch.Tensor:
        """[n] of every process -> [processes, n]."""
        return gather(self.accelerator, state) if self.is_distributed else state[None].cpu()

    def _refuse_sharding(self, method: str) -> None:
        if is_sharded(self.accelerator):
            raise ValueError(
                f"{method}: every process must hold whole weights, got {self.accelerator.distributed_type.value}; "
                "use trainer.accelerator.save_state and load_state"
            )


def _parse(path: str) -> SavedRun:
    """Reads a file. Raises ValueError that names it if it is missing, damaged, or not by `save_run`."""
    names = checkpoint.tensor_names(path)
    if "state" not in names:
        raise ValueError(f"load_run: {path} must be written by save_run, got {len(names)} other tensors")
    checkpoint.check_digest(path)
    tensors = checkpoint.read_tensors(path)
    try:
        content = json.loads(tensors["state"].numpy().tobytes())
        state = {name: decode(value, tensors) for name, value in content["state"].items()}
        random = {name.removeprefix("random."): x for name, x in tensors.items() if name.startswith("random.")}
        return SavedRun(path, tensors, random, state, content["fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load_run: {path} must be written by save_run, got {type(error).__name__}: {error}") from None


def _check_numbers(owner: str, state: Mapping[str, Any]) -> None:
    """Raises ValueError if a number that every step reads is not finite: nothing that is computed from it would be."""
    numbers = {f"running.{name}": value for name, value in state["running"].items()}
    numbers["kl_ctl.value"] = state["kl_ctl"]["value"]
    for i, group in enumerate(state["optimizer"]["param_groups"]):
        numbers[f"the learning rate of group {i}"] = group.get("lr", 0.0)
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{owner}: {name} must be finite, got {value}")


def _check_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Raises ValueError unless the optimizer gets its own state back: some store what they cannot load, or cast it.

    Tried on a shallow copy, which shares the tensors.
    """
    trial = copy.copy(optimizer)
    try:
        trial.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"save_run: the optimizer must take its own state, got {type(error).__name__}: {error}"
        ) from error
    changed = difference(trial.state_dict(), state, "optimizer")
    if changed is not None:
        raise ValueError(f"save_run: {changed} must come back equal from the optimizer's load_state_dict, got another")
