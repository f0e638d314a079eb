"""The demo; see cli.py."""

from .cli import main

__all__ = ["main"]
