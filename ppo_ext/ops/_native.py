"""Loads the compiled libraries, defines their operators, and says on which devices they run.

`_C_cpu.so` and `_C_cuda.so` hold the implementations of the operators whose schemas the op modules define. Where a
library is missing, the op modules call `ppo_ext.ops.reference` instead, and a warning says so once for each type of
device.
"""

import importlib.metadata
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

_FOLDER = pathlib.Path(__file__).parent.parent
_OLDEST_TORCH = (2, 10)  # has all that the libraries take from it


def _find_installed():
    """The folder of an installed ppo_ext that has the CPU library, if this one lacks it: a checkout that hides it."""
    if (_FOLDER / "_C_cpu.so").exists():
        return None
    for distribution in importlib.metadata.distributions(name="ppo_ext"):
        folder = pathlib.Path(distribution.locate_file("ppo_ext")).resolve()
        if folder != _FOLDER.resolve() and (folder / "_C_cpu.so").exists():
            return folder
    return None


_INSTALLED = _find_installed()
_REBUILD = (
    "start Python in another folder"
    if _INSTALLED
    else "reinstall with `pip install --force-reinstall --no-deps --no-cache-dir .` and read the build's output"
)


def _load(name: str, wanted: bool) -> str | None:
    """Loads a library; returns None, or the reason why it is not loaded."""
    if os.environ.get("PPO_EXT_DISABLE_NATIVE") == "1":
        return "disabled by PPO_EXT_DISABLE_NATIVE=1"
    if not wanted:
        return "this torch has no CUDA"
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        return f"torch must be {oldest} or newer, got {torch.__version__} (pip install --upgrade torch)"
    path = _FOLDER / name
    if not path.exists() and _INSTALLED:
        return f"{_FOLDER} has no {name}, and Python finds it before the installed {_INSTALLED}"
    if not path.exists():
        return f"{name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{name} does not load: {error}"
    return None


_ERRORS = {
    "cpu": _load("_C_cpu.so", True),
    "cuda": _load("_C_cuda.so", torch.version.cuda is not None),
}
_LOADED = frozenset(device for device, error in _ERRORS.items() if error is None)
_WARNED: set[str] = set()

if os.environ.get("PPO_EXT_REQUIRE_NATIVE") == "1" and "cpu" not in _LOADED:
    raise ImportError(f"ppo_ext: PPO_EXT_REQUIRE_NATIVE=1, but {_ERRORS['cpu']}; {_REBUILD}")


def status() -> dict[str, str]:
    """For each type of device "loaded", or the reason why its library is not."""
    return {device: error or "loaded" for device, error in _ERRORS.items()}


def available(device_type: str) -> bool:
    """Whether the compiled ops run on this type of device; warns once for each type on which they do not.

    They also run on "meta", where only shapes are computed.
    """
    if device_type in _LOADED or device_type == "meta":
        return True
    if device_type not in _WARNED:
        _WARNED.add(device_type)
        reason = _ERRORS.get(device_type, f"there are no compiled ops for {device_type}")
        warnings.warn(
            f"ppo_ext: {reason}; its slow reference implementation runs on {device_type}. "
            f"To change that: {_REBUILD}; `python -m ppo_ext info` tells more.",
            stacklevel=3,
        )
    return False


def define(schema: str) -> tuple[torch._ops.OpOverload, str]:
    """Defines the operator `ppo_ext::<schema>`; returns its default overload and its qualified name.

    Torch keeps an operator until the process ends. When a module is imported again (importlib.reload, IPython's
    autoreload), the operator is already there and is returned as it is.
    """
    short, parenthesis, arguments = schema.partition("(")
    name = f"ppo_ext::{short}"
    if not hasattr(torch.ops.ppo_ext, short):
        torch.library.define(name, parenthesis + arguments, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.ppo_ext, short).default
    if operator._schema != torch._C.parse_schema(f"ppo_ext::{schema}"):
        raise RuntimeError(f"ppo_ext: {short} must keep its schema {operator._schema}, got another; restart Python")
    return operator, name


def implement(name: str, function: Callable) -> None:
    """Makes a function of Python the operator's implementation on a CPU and on CUDA, until the process ends."""
    for key in ("CPU", "CUDA"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            torch.library.impl(name, key.lower())(function)


def register_fake(name: str) -> Callable[[Callable], None]:
    """`torch.library.register_fake` for a function that may assume that all its tensors are on one device.

    Torch also calls it when some tensors are on "meta" and others are not, so that is an error here. Like the operator,
    the function that was registered first stays until the process ends.
    """

    def register(fake: Callable) -> None:
        def checked(*arguments: Any) -> Any:
            devices = {str(x.device) for x in arguments if isinstance(x, torch.Tensor)}
            if len(devices) > 1:
                raise ValueError(
                    f"{name.split('::')[1]}: the tensors must be on one device, got {' and '.join(sorted(devices))}"
                )
            return fake(*arguments)

        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
            torch.library.register_fake(name)(checked)

    return register
