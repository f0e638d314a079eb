"""The states of the random generators that a run draws from: Python's, numpy's, torch's, and that of the CUDA device."""

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch


def random_state() -> dict[str, torch.Tensor]:
    """The states, each as a 1-D tensor.

    Raises: ValueError if numpy draws from another generator than its default one, whose state has another form.
    """
    _, words, gauss = random.getstate()
    kind = cast(Any, np.random.get_state(legacy=False))["bit_generator"]
    if kind != "MT19937":
        raise ValueError(f"save_run: numpy's global generator must be MT19937, got {kind}")
    _, keys, position, has_gauss, cached = cast(Any, np.random.get_state())
    states = {
        "python": torch.tensor([*words, 0 if gauss is None else 1], dtype=torch.int64),
        "python_gauss": torch.tensor([gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def check_random_state(owner: str, states: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError that begins with `owner` if `set_random_state` would raise; changes nothing."""
    current = random_state()
    if states.keys() != current.keys():
        raise ValueError(f"{owner} must hold the random states {sorted(current)}, got {sorted(states)}")
    for name, state in states.items():
        if state.shape != current[name].shape or state.dtype != current[name].dtype:
            expected = f"{current[name].dtype} of shape {list(current[name].shape)}"
            raise ValueError(
                f"{owner} must hold the random state {name} as {expected}, got {state.dtype} {list(state.shape)}"
            )
    try:
        random.Random().setstate(_python(states))
        np.random.RandomState().set_state(_numpy(states))
        torch.Generator().set_state(_whole(states["torch"]))
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{owner} must hold random states that the generators take, got {error}") from None


def set_random_state(states: Mapping[str, torch.Tensor]) -> None:
    """Sets what `random_state` returned."""
    random.setstate(_python(states))
    np.random.set_state(_numpy(states))
    torch.set_rng_state(_whole(states["torch"]))
    if "cuda" in states:
        torch.cuda.set_rng_state(_whole(states["cuda"]))


def _python(states: Mapping[str, torch.Tensor]) -> Any:
    *words, has_gauss = states["python"].tolist()
    return 3, tuple(words), states["python_gauss"].item() if has_gauss else None


def _numpy(states: Mapping[str, torch.Tensor]) -> Any:
    *keys, position, has_gauss = states["numpy"].tolist()
    return "MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()


def _whole(state: torch.Tensor) -> torch.Tensor:
    """A copy: torch reads a generator's state from the beginning of its storage, and a row of a table is elsewhere."""
    return state.clone(memory_format=torch.contiguous_format)
