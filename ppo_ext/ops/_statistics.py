"""The statistics of a loss, which become tensors when they are first read: making them takes a good part of a small call."""

import collections
import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree


class Statistics(dict):
    """A dict of tensors, whose copies are ordinary dicts."""

    __slots__ = ("_unread",)
    _unread: tuple | None

    def __copy__(self) -> dict:
        return dict(self)

    def __deepcopy__(self, memo: dict) -> dict:
        return copy.deepcopy(dict(self), memo)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # torch.load takes this class from any file, and dict itself only from files that it is told to trust
        return collections.OrderedDict, (), None, None, iter(self.items())


class _Unread(Statistics):
    """Before one of its methods is first called, which fills it and makes it a `Statistics`.

    Until then it holds its first name alone: C code that asks for the size and not for the entries, as that of json does,
    must not take it for an empty dict.
    """

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Statistics:  # type: ignore[misc]
        return Statistics(*args, **kwargs)


OF_TOKENS = ("policy/advantages", "policy/ratio")


def unread(names: tuple[str | None, ...], vector: torch.Tensor, of_tokens: Iterable[torch.Tensor]) -> Statistics:
    """The entries of `vector` under these names, of which None is left out, and those of `of_tokens` under OF_TOKENS.
    Nobody may change them."""
    stats: Any = dict.__new__(_Unread)
    dict.__setitem__(stats, names[0], None)
    stats._unread = names, vector, of_tokens
    return stats


def read(names: tuple[str | None, ...], vector: torch.Tensor, of_tokens: Iterable[torch.Tensor]) -> dict:
    """What `unread` becomes, as an ordinary dict."""
    stats = dict(zip(names, vector.unbind()))
    stats.pop(None, None)
    stats.update(zip(OF_TOKENS, of_tokens))
    return stats


# ---- the methods ----------------------------------------------------------------------------------------------------


def _fill(x: Any) -> None:
    waiting = x._unread if type(x) is _Unread else None
    if waiting is not None:
        dict.update(x, read(*waiting))
        x.__class__ = Statistics
        x._unread = None


def _after_filling(method: Any) -> Any:
    @functools.wraps(method)
    def filled(*args: Any, **kwargs: Any) -> Any:
        for x in args:  # dict's comparisons read the entries of the other dict without calling a method of it
            _fill(x)
        return method(*args, **kwargs)

    return filled


_WITHOUT_ENTRIES = {"__new__", "__init__", "__getattribute__", "__class_getitem__", "__hash__", "__doc__", "fromkeys"}
for _name in vars(dict).keys() - _WITHOUT_ENTRIES:
    setattr(_Unread, _name, _after_filling(getattr(dict, _name)))
for _class in (Statistics, _Unread):
    _pytree.register_pytree_node(
        _class,
        lambda stats: (list(stats.values()), list(stats)),
        lambda values, names: dict(zip(names, values)),
        flatten_with_keys_fn=lambda stats: ([(_pytree.MappingKey(name), x) for name, x in stats.items()], list(stats)),
    )
