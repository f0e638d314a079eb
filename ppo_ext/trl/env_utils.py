"""`trl.env_utils`: truth values in environment variables."""

from typing import TYPE_CHECKING

from ._names import module_getattr

__all__ = ["strtobool"]


def strtobool(val: str) -> bool:
    """True for y, yes, t, true, on and 1, False for n, no, f, false, off and 0, in any case; ValueError for others."""
    lowered = val.lower()
    if lowered in ("y", "yes", "t", "true", "on", "1"):
        return True
    if lowered in ("n", "no", "f", "false", "off", "0"):
        return False
    raise ValueError(f"strtobool: val must be yes or no, true or false, on or off, 1 or 0, got {val!r}")


if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
