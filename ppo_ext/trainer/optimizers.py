"""The optimizer that a trainer makes when it is given none, and what one that it is given must be able to do."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch

_FUSED_DEVICES = ("cpu", "cuda")
_REHEARSED_STEPS = 8  # RAdam divides by its second moment from the sixth step on


def make(
    optimizer: type[torch.optim.Adam], parameters: Iterable[Any], device: torch.device, **options: Any
) -> torch.optim.Optimizer:
    """Adam or AdamW over the parameters that require a gradient, with torch's fused kernel where `device` has one.

    parameters: or groups of them, of which all require a gradient.

    The fused kernel reads gradients, moments and weights once and makes no copies of them; its results differ by
    rounding only.
    """
    trained = [part for part in parameters if isinstance(part, dict) or part.requires_grad]
    return optimizer(trained, fused=True if device.type in _FUSED_DEVICES else None, **options)


# ---- checks of what a user hands over --------------------------------------------------------------------------------


def check(
    optimizer: Any,
    lr_scheduler: Any,
    trained: Iterable[torch.nn.Parameter],
    device: torch.device | str = "cpu",
    critic: Iterable[torch.nn.Parameter] = (),
) -> None:
    """Raises TypeError or ValueError for an optimizer or a schedule that cannot train these parameters.

    Each kind would otherwise be found out only after weights have changed, or never: an optimizer that needs a closure
    or gives NaN, one of other weights, a schedule that needs a metric or belongs to another optimizer.

    device: where weights that are on the CPU now will be trained. critic: its trained weights, if there is one.
    """
    if type(optimizer).__name__ == "DummyOptim":  # accelerate's, for the one in DeepSpeed's configuration
        return
    optimizer = getattr(optimizer, "optimizer", optimizer)  # within accelerate's wrapper
    if isinstance(optimizer, type) or not all(
        hasattr(optimizer, name) for name in ("step", "zero_grad", "param_groups")
    ):
        name = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        _fail("optimizer", "be a torch optimizer, made with the model's parameters", name, TypeError)
    kind = type(optimizer).__name__
    if _needs_arguments(optimizer):
        _fail("optimizer", "step without a closure", f"{kind}, which needs one; use for example AdamW")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not held & {id(parameter) for parameter in trained}:
        advice = "make it of model.parameters() once the model has its adapters"
        _fail(
            "optimizer", "hold weights of the model that require a gradient", f"{kind} of {len(held)} others; {advice}"
        )
    of_critic = {id(parameter) for parameter in critic}
    if of_critic and not held & of_critic:
        _fail(
            "optimizer",
            "hold weights of critic_model that require a gradient",
            f"{kind} without them; make it of the parameters of both",
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        _fail("optimizer", "minimise the loss", f"{kind} with maximize=True")
    if type(optimizer).step.__module__.startswith("torch.optim"):
        _rehearse(optimizer, torch.device(device))
    for schedule in _schedules(lr_scheduler):
        if _needs_arguments(schedule):
            name = type(schedule).__name__
            _fail("lr_scheduler", "step without a metric", f"{name}, which needs one; step it yourself after each step")
    if (
        lr_scheduler is not None
        and getattr(lr_scheduler.optimizer, "optimizer", lr_scheduler.optimizer) is not optimizer
    ):
        _fail("lr_scheduler", "be made of the optimizer that the trainer gets", "one of another optimizer; pass both")


def _rehearse(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Lets a copy of an optimizer of torch update small weights of the dtypes that it holds, which must stay finite."""
    rehearsal = copy.copy(optimizer)  # takes over no hooks and no wrapper around step
    for group in optimizer.param_groups:
        for dtype, found in dict.fromkeys((p.dtype, p.device) for p in group["params"] if p.requires_grad):
            where = device if found.type in ("cpu", "meta") else found
            weight = torch.nn.Parameter(torch.ones(3, 2, dtype=dtype, device=where))
            weight.grad = torch.tensor([[0.0, 1e-8], [1e-4, -1e-4], [1.0, -1.0]], dtype=dtype, device=where)
            rehearsal.param_groups, rehearsal.state = [{**group, "params": [weight]}], defaultdict(dict)
            kind = type(optimizer).__name__
            try:
                for _ in range(_REHEARSED_STEPS):
                    rehearsal.step()
            except (RuntimeError, AssertionError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"PPOTrainer: optimizer must step on {dtype} weights, got {kind}: {reason}") from error
            if not torch.isfinite(weight).all():
                settings = ", ".join(f"{name}={group[name]}" for name in ("eps", "lr") if name in group)
                advice = "take a larger eps, such as 1e-4, a smaller lr, or weights in float32"
                _fail("optimizer", f"keep {dtype} weights finite", f"{kind} with {settings}; {advice}")


def _schedules(lr_scheduler: Any) -> Iterator[Any]:
    """A schedule and those that it is made of."""
    if lr_scheduler is not None:
        yield lr_scheduler
        for part in getattr(lr_scheduler, "_schedulers", ()):
            yield from _schedules(part)


def _needs_arguments(stepped: Any) -> bool:
    """Whether `step()` would raise. The class is asked, since a schedule wraps the method of its optimizer."""
    _, *parameters = inspect.signature(type(stepped).step).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in positional and p.default is p.empty for p in parameters)


def _fail(argument: str, condition: str, got: str, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"PPOTrainer: {argument} must {condition}, got {got}")
