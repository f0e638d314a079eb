"""Exchanges an object for another one in every module of a package that holds it."""

import sys
from collections.abc import Iterator
from types import ModuleType


def exchange(package: str, old: object, new: object) -> list[str]:
    """Puts `new` where a loaded module of `package` holds `old`; returns the names, such as "trl.trainer.utils.pad".

    `from module import f` makes a copy of the reference, so it is not enough to change the module that defines `f`.
    Modules that are imported later take what the defining module holds then.
    """
    changed = []
    for module in _loaded(package):
        for name in [name for name, value in vars(module).items() if value is old]:
            setattr(module, name, new)
            changed.append(f"{module.__name__}.{name}")
    return sorted(changed)


def _loaded(package: str) -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        # some libraries put objects into sys.modules that only behave like modules, and None forbids an import
        if (name == package or name.startswith(f"{package}.")) and isinstance(module, ModuleType):
            yield module
