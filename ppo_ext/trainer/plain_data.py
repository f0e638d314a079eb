"""Nested Python values as JSON and tensors, so that they come back equal, with their types, or are refused.

JSON alone turns the keys of a dict into text, tuples into lists and numbers of numpy into numbers of Python, and a resumed
run then goes another way: the milestones of a MultiStepLR, for example, are keys.
"""

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_TYPE = "$type"  # marks what JSON has no form for
_DICTS: dict[str, type[Any]] = {"dict": dict, "Counter": Counter, "OrderedDict": OrderedDict}


def encode(owner: str, value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """What `json` can write of a value; its tensors are added to `tensors` and stand for themselves by name.

    Args:
        owner, name: begin the error; such as "save_run" and "lr_scheduler".
    Raises: ValueError for a value that would not come back equal, such as a function, a NaN or an object.
    """
    encoded = _encode(owner, value, name, tensors)
    changed = difference(decode(json.loads(json.dumps(encoded)), tensors), value, name)
    if changed is not None:
        raise ValueError(f"{owner}: {changed} must be data that is equal when it is read again, got another value")
    return encoded


def _encode(owner: str, value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and value == value):
        return value
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized:
        while name in tensors:
            name += "_"
        tensors[name] = value.detach()
        return {_TYPE: "tensor", "name": name}
    if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value == value:
        return {_TYPE: "numpy", "dtype": value.dtype.name, "value": value.item()}
    if kind in (list, tuple):
        items = [_encode(owner, item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if kind is list else {_TYPE: "tuple", "items": items}
    if kind is dict and all(type(key) is str for key in value) and _TYPE not in value:
        return {key: _encode(owner, item, f"{name}.{key}", tensors) for key, item in value.items()}
    if kind in _DICTS.values():
        pairs = [
            [_encode(owner, key, f"{name}.keys", tensors), _encode(owner, item, f"{name}.{key}", tensors)]
            for key, item in value.items()
        ]
        return {_TYPE: kind.__name__, "items": pairs}
    got = "NaN" if isinstance(value, (float, np.floating)) else f"{kind.__module__}.{kind.__qualname__}"
    raise ValueError(f"{owner}: {name} must be a number, text, tensor, list, tuple or dict, got {got}")


def decode(encoded: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value of which `encode` made this."""
    if isinstance(encoded, list):
        return [decode(item, tensors) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    kind = encoded.get(_TYPE)
    if kind is None:
        return {key: decode(item, tensors) for key, item in encoded.items()}
    if kind == "tensor":
        return tensors[encoded["name"]]
    if kind == "numpy":
        return np.dtype(encoded["dtype"]).type(encoded["value"])
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in encoded["items"])
    return _DICTS[kind]({decode(key, tensors): decode(item, tensors) for key, item in encoded["items"]})


def difference(a: Any, b: Any, name: str) -> str | None:
    """The name of the first entry in which two values differ, also by type; None if they are the same, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if same_bits(a, b) else name
    if type(a) is not type(b):
        return name
    if isinstance(a, Mapping):
        # in order, and with the types of the keys: 1, 1.0 and True are one key
        a, b = [x for pair in a.items() for x in pair], [x for pair in b.items() for x in pair]
        names = [f"{name}.{key}" for key in a[::2] for _ in range(2)]
    elif isinstance(a, (list, tuple)):
        names = [f"{name}.{i}" for i in range(len(a))]
    else:
        return None if a == b else name
    if len(a) != len(b):
        return name
    found = (difference(x, y, inner) for x, y, inner in zip(a, b, names, strict=True))
    return next((inner for inner in found if inner is not None), None)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits; so NaN is the same as NaN and -0.0 not as 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.device == b.device:
        return True
    return torch.equal(as_bytes(a), as_bytes(b.to(a.device)))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, 1-D uint8."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
