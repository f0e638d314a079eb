"""The one rule that decides whether a user has replaced a method of `PPOTrainer`."""

from collections.abc import Callable
from typing import Any, TypeVar

_Method = TypeVar("_Method", bound=Callable[..., Any])

_SHIPPED: set[Callable[..., Any]] = set()


def replaceable(method: _Method) -> _Method:
    """Decorator of the methods that `is_overridden` may be asked about; remembers the function as it is shipped."""
    _SHIPPED.add(method)
    return method


def is_overridden(trainer: object, *names: str) -> bool:
    """Whether any of these methods of the trainer is not the one shipped with this package.

    True for a method that a subclass overrides, that was set on the instance, or that was set on PPOTrainer itself.
    """
    return not all(_is_shipped(trainer, getattr(trainer, name)) for name in names)


def _is_shipped(trainer: object, method: Any) -> bool:
    # a method of another trainer, set on this one, is somebody's choice as well
    return getattr(method, "__func__", None) in _SHIPPED and method.__self__ is trainer
