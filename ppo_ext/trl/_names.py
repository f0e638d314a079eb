"""Names and modules of `ppo_ext.trl` that are not imported with it: those imported on first use, and those it lacks."""

import dis
import importlib
import sys
from collections.abc import Mapping
from importlib.abc import MetaPathFinder

_THE_REST = "it holds what TRL 0.7 to 0.11 have for PPO; keep importing the rest from trl"


def module_getattr(module, lazy: Mapping[str, str] = {}):  # noqa: B006
    """A `__getattr__` for the module. lazy: {name: the module that has it}, imported on first use.

    For any other name there is one sentence in place of Python's own "cannot import name". `from module import name`
    raises ImportError. Any other access raises AttributeError, so that `hasattr` is False and `getattr` with a default
    works. Python replaces the text of an AttributeError in a from-import, which is why the two are told apart here.
    """

    def __getattr__(name):
        if name in lazy:
            return getattr(importlib.import_module(lazy[name]), name)
        message = f"{module} has no {name}: {_THE_REST}"
        kind = ImportError if not _is_dunder(name) and _is_from_import(sys._getframe(1)) else AttributeError
        raise kind(message, name=name)

    return __getattr__


class AbsentModules(MetaPathFinder):
    """Python asks it last, so for a module of `package` that does not exist. The import's error then says why."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, fullname, path, target=None):
        # `importlib.util.find_spec`, which asks whether a module is there, gets None as from any other finder
        is_import = sys._getframe(2).f_code.co_name == "_find_and_load_unlocked"
        if is_import and fullname.startswith(f"{self.package}."):
            parent, _, name = fullname.rpartition(".")
            raise ModuleNotFoundError(f"{parent} has no module {name}: {_THE_REST}", name=fullname)

    def install(self) -> None:
        """Once for the package, also if it is imported again."""
        kept = [finder for finder in sys.meta_path if getattr(finder, "package", None) != self.package]
        sys.meta_path[:] = [*kept, self]


def _is_dunder(name):
    return name.startswith("__") and name.endswith("__")  # `__path__` and the like, which the import system asks for


def _is_from_import(frame):
    code = frame.f_code
    # a package's names are first looked up by `_handle_fromlist` of importlib, a plain module's by this instruction
    return code.co_name == "_handle_fromlist" or dis.opname[code.co_code[frame.f_lasti]] == "IMPORT_FROM"
