"""Statistics of a step: TRL's dict helpers, the running moments of scores, and one transfer to the host."""

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..models import checkpoint

WANDB_PADDING = -1  # fills the shorter rows of stack_dicts, as in TRL


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a/b": 1}. Raises ValueError for a key that contains `sep`. Source: TRL 0.11.4."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if sep in key:
            raise ValueError(f"flatten_dict: keys must not contain the separator {sep!r}, got {key!r}")
        if isinstance(value, Mapping):
            flat.update({f"{key}{sep}{inner}": leaf for inner, leaf in flatten_dict(value, sep).items()})
        else:
            flat[key] = value
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One dict from many: each entry flattened and stacked to [len(stats_dicts), longest], padded with -1."""
    return {
        key: pad_sequence([torch.flatten(d[key]) for d in stats_dicts], batch_first=True, padding_value=WANDB_PADDING)
        for key in stats_dicts[0]
    }


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays and tensors of one element and at most one dimension become Python numbers; the rest stays."""
    arrays = (torch.Tensor, np.ndarray)
    return {
        key: value.item() if isinstance(value, arrays) and tuple(value.shape) in ((), (1,)) else value
        for key, value in stats.items()
    }


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors become numpy arrays (bfloat16 as float32), scalars become floats."""
    result = {}
    for key, value in on_host(stats_dict).items():
        if isinstance(value, torch.Tensor):
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        result[key] = float(cast(float, value)) if np.isscalar(value) else value
    return result


def on_host(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The dict with its tensors detached and on the CPU: one transfer, and so one host/device sync, per dtype."""
    tensors = {key: value.detach() for key, value in stats.items() if isinstance(value, torch.Tensor)}
    result = {**stats, **tensors}
    away = [key for key, value in tensors.items() if value.device.type != "cpu"]
    for group in {(tensors[key].dtype, tensors[key].device) for key in away}:
        keys = [key for key in away if (tensors[key].dtype, tensors[key].device) == group]
        flat = torch.cat([tensors[key].reshape(-1) for key in keys]).cpu()
        result.update(zip(keys, unpack(flat, [tensors[key] for key in keys]), strict=True))
    return result


def unpack(flat: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The consecutive parts of a 1-D tensor in the shapes of the tensors in `like`."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


class Clock:
    """Seconds spent in each part of a step, under TRL's keys."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[f"time/ppo/{part}"] = time.perf_counter() - started

    def total(self) -> dict[str, float]:
        """The seconds of all parts, and the time since the clock was made."""
        return {**self.seconds, "time/ppo/total": time.perf_counter() - self.started}


@dataclasses.dataclass
class RunningMoments:
    """Running mean and standard deviation of a stream of scores, over all processes.

        delta = mean(xs) - mean;  total = count + n
        mean += delta * n / total
        var = (var * count + delta^2 * count * n / total + var(xs) * n) / total
        std = sqrt(var * total / (total - 1))

    `std` is 1 until two scores have been seen (TRL: NaN). Source: TRL 0.9.6, `RunningMoments`.
    """

    accelerator: Any
    mean: float = 0.0
    std: float = 1.0
    var: float = 1.0
    count: float = 1e-24

    @torch.no_grad()
    def update(self, xs: torch.Tensor) -> tuple[float, float]:
        """Take in a batch of scores [B]; returns their (mean, unbiased standard deviation) over all processes."""
        n, mean, var = self._batch_moments(xs.double() if xs.device.type == "cpu" else xs.float())
        total = self.count + n
        delta = mean - self.mean
        self.var = (self.var * self.count + delta**2 * self.count * n / total + var * n) / total
        self.mean += delta * n / total
        self.count = total
        if total > 1:
            self.std = (self.var * total / (total - 1)) ** 0.5
        return mean, (var * n / (n - 1)) ** 0.5 if n > 1 else 0.0

    def _batch_moments(self, xs: torch.Tensor) -> tuple[float, float, float]:
        n, total = self._reduce(torch.stack([xs.new_tensor(xs.numel()), xs.sum()])).tolist()
        mean = total / n
        return n, mean, self._reduce((xs - mean).square().sum()).item() / n

    def _reduce(self, x: torch.Tensor) -> torch.Tensor:
        if not self.accelerator.use_distributed:
            return x
        return self.accelerator.reduce(x.to(self.accelerator.device), reduction="sum")

    def scale(self, scores: torch.Tensor, subtract_mean: bool) -> torch.Tensor:
        """(scores - mean) / std or scores / std. Source: TRL 0.9.6, `PPOTrainer.step` (0.11.4 raises here)."""
        shifted = scores - self.mean if subtract_mean else scores
        return shifted / (self.std + torch.finfo(scores.dtype).eps)

    def save_to_json(self, json_path: str | os.PathLike[str]) -> None:
        """Write mean, std, var and count to a file, on the main process."""
        if self.accelerator.is_main_process:
            state = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "accelerator"}
            checkpoint.write_json(json_path, state)

    @classmethod
    def load_from_json(cls, accelerator: Any, json_path: str | os.PathLike[str]) -> "RunningMoments":
        """The moments that `save_to_json` wrote to a file."""
        return cls(accelerator=accelerator, **checkpoint.read_json(json_path))
