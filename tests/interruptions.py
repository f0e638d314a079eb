"""Doing something at one chosen line of Python in a call, in whatever package it stands."""

import functools
import sys

STEP = ("ppo_ext", "peft", "accelerate", "torch/optim", "torch/amp", "contextlib")  # what runs in a step, by path


class Ctrl_C(KeyboardInterrupt):
    """Not KeyboardInterrupt itself, so that pytest goes on if a test lets it through."""


class Lines:
    """Calls `action` when line number `at` of some packages is about to run; counts their lines."""

    def __init__(self, action=None, at=None, packages=STEP):
        self.action, self.at, self.count = action, at, 0
        self.is_counted = functools.cache(lambda path: any(f"/{name}" in path for name in packages))

    def __enter__(self):
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _enter(self, frame, event, arg):
        return self._line if self.is_counted(frame.f_code.co_filename) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.count += 1
            if self.count - 1 == self.at:
                self.action()
        return self._line


def interrupt():
    sys.settrace(None)
    raise Ctrl_C


def count_lines(call):
    with Lines() as lines:
        call()
    return lines.count


def interrupted_at(line, call):
    """Whether the call ends in the Ctrl-C that comes at this line."""
    try:
        with Lines(interrupt, line):
            call()
    except Ctrl_C:
        return True
    return False
