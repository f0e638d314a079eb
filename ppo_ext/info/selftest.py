"""The self-test of `python -m ppo_ext info`: every op of ppo_ext against the reference, on one device, within a
second."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

import ppo_ext

from ..ops import reference

_LIMIT = 1e-4  # float32 against float32 with another order of summation; a wrong kernel is off by far more


def run(devices: Iterable[str]) -> dict[str, dict[str, Any]]:
    """{device: {"passed", "limit", "errors": {op: largest error}, "raised": {op: message}}}."""
    return {device: _run_on(device) for device in devices}


def ops() -> list[str]:
    """The names of all ops: the public functions that the reference specifies."""
    return [name for name in ppo_ext.__all__ if hasattr(reference, name)]


def _run_on(device: str) -> dict[str, Any]:
    errors, raised = {}, {}
    for name in ops():
        try:
            arguments = _arguments(getattr(reference, name), device)
            expected = _results(getattr(reference, name), arguments)
            errors[name] = _largest_error(_results(getattr(ppo_ext, name), arguments), expected)
        except Exception as error:  # whatever it is, the report must reach the reader
            raised[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    passed = not raised and all(error <= _LIMIT for error in errors.values())
    return {"passed": passed, "limit": _LIMIT, "errors": errors, "raised": raised}


def _arguments(function: Callable, device: str) -> dict[str, Any]:
    """The arguments that `function` has no default for, and the mask, by name."""
    generator = torch.Generator().manual_seed(0)
    B, T, V, H = 4, 9, 1003, 16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    made = {
        "logits": normal(B, T, V),
        "ref_logits": normal(B, T, V),
        "labels": torch.randint(V, (B, T), generator=generator),
        "mask": torch.arange(T) < torch.tensor([[9], [7], [1], [0]]),
        "scores": normal(B),
        "kl_coef": 0.2,
        "hidden": normal(B, T, H),
        "weight": normal(V, H),
    }
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if name == "mask" or parameter.default is inspect.Parameter.empty:
            value = made[name] if name in made else -normal(B, T).abs()  # one number a token
            found[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    return found


def _results(function: Callable, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The outputs of `function` and, if they have any, the gradients of their sum."""
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in arguments.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    outputs = function(**arguments | leaves)
    outputs = [x for x in outputs if isinstance(x, torch.Tensor)] if isinstance(outputs, tuple) else [outputs]
    results = [x.detach() for x in outputs]
    if any(x.requires_grad for x in outputs):
        total = torch.stack([x.sum() for x in outputs]).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        results += [grad for grad in found if grad is not None]
    return results


def _largest_error(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Over outputs and gradients, relative where the reference is above 1."""
    worst = 0.0
    for a, b in zip(ours, expected, strict=True):
        if not torch.isfinite(a).all():
            raise ArithmeticError("the result is not finite")
        worst = max(worst, ((a - b).abs() / b.abs().clamp(min=1)).max().item())
    return worst
