"""The prompts: the packaged openings of reviews, or a file of the user's, split into training and held-out ones."""

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch

from ..text import read_text

MIN_OPENINGS = 16


class Openings(NamedTuple):
    """Prompts as text; no held-out opening is ever trained on."""

    train: list[str]
    held_out: list[str]


def packaged_openings() -> list[str]:
    """400 openings written for this demo; every word of them is neutral in the lexicons of VADER and AFINN."""
    return _lines(files(__package__).joinpath("openings.txt").read_text(encoding="utf-8"))


def read_openings(path: Path) -> list[str]:
    """One opening per line of a UTF-8 text file."""
    openings = _lines(read_text(path))
    if len(openings) < MIN_OPENINGS:
        raise ValueError(
            f"demo: --corpus must hold at least {MIN_OPENINGS} different lines, each the opening of a text, "
            f"got {len(openings)} in {path}"
        )
    return openings


def split(openings: list[str], held_out: int, seed: int) -> Openings:
    """A random split; at most half of a short list is held out."""
    order = torch.randperm(len(openings), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [openings[i] for i in order]
    cut = min(held_out, len(shuffled) // 2)
    return Openings(train=shuffled[cut:], held_out=shuffled[:cut])


def draw(openings: list[str], count: int, seed: int) -> list[str]:
    """`count` openings in random order; none comes a second time before all were drawn."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // len(openings))
    order = torch.cat([torch.randperm(len(openings), generator=generator) for _ in range(rounds)])
    return [openings[i] for i in order[:count].tolist()]


def _lines(text: str) -> list[str]:
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
