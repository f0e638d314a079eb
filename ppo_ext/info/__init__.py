"""`python -m ppo_ext info`: what is installed, and whether it works."""

from .report import main

__all__ = ["main"]
