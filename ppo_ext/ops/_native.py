"""Loads the compiled libraries and says which of them can run.

`_C_cpu.so` and `_C_cuda.so` register implementations of the operators whose schemas the op modules define. Where a
library is missing, the op modules call `ppo_ext.ops.reference` instead and one warning says so.
"""

import importlib.metadata
import os
import pathlib
import warnings

import torch

_FOLDER = pathlib.Path(__file__).parent.parent


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


def _load(name, wanted):
    """None if loaded, else the reason as one string."""
    if os.environ.get("PPO_EXT_DISABLE_NATIVE") == "1":
        return "disabled by PPO_EXT_DISABLE_NATIVE=1"
    if not wanted:
        return "this torch has no CUDA"
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
_WARNED = set()

if os.environ.get("PPO_EXT_REQUIRE_NATIVE") == "1" and "cpu" not in _LOADED:
    raise ImportError(f"ppo_ext: PPO_EXT_REQUIRE_NATIVE=1, but {_ERRORS['cpu']}; {_REBUILD}")


def status():
    """What each backend's library is: 'loaded', or why it is not."""
    return {device: error or "loaded" for device, error in _ERRORS.items()}


def available(device_type):
    """Whether the compiled ops run on this device, or its tensors have shapes only; warns once per device if not."""
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


def define(schema):
    """Defines the operator `ppo_ext::<schema>` and returns its default overload and its qualified name."""
    name = "ppo_ext::" + schema[: schema.index("(")]
    torch.library.define(name, schema[schema.index("(") :], tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.ppo_ext, name.split("::")[1]).default, name


def register_fake(name):
    """`torch.library.register_fake` for a function that may rely on its tensors being on one device.

    Where some are on `meta` and others are not, torch runs the fake; what that returns on the CPU nobody has written.
    """

    def register(fake):
        def checked(*arguments):
            devices = {str(x.device) for x in arguments if isinstance(x, torch.Tensor)}
            if len(devices) > 1:
                raise ValueError(
                    f"{name.split('::')[1]}: the tensors must be on one device, got {' and '.join(sorted(devices))}"
                )
            return fake(*arguments)

        torch.library.register_fake(name)(checked)

    return register
