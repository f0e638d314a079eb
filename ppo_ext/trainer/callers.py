"""Warnings that name the line of the user's program, however many methods of this package lie between."""

import sys
import warnings

_PACKAGE = __name__.partition(".")[0] + "."


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """`warnings.warn` for the innermost caller outside this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
