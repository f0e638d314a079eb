"""The selection under pytest-benchmark, to keep runs of one machine and compare later ones with them:

    pytest bench/test_speed.py -o addopts= --benchmark-autosave          # -k ppo_ext for our ops alone
    pytest bench/test_speed.py -o addopts= --benchmark-compare

The published numbers do not come from here but from `python -m bench`, where competitors take turns.
"""

import functools
import importlib

import pytest
import torch

from . import command
from .suite import Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {case.title: case for name in command.MODULES
         for case in importlib.import_module(f"bench.bench_{name}").suite(DEVICE, False) if isinstance(case, Case)}


@functools.lru_cache(maxsize=1)
def prepared(title):
    """(inputs, what is right) of one case, kept while its implementations run one after the other."""
    torch.manual_seed(0)
    inputs = CASES[title].make(DEVICE)
    return inputs, CASES[title].select(inputs, CASES[title].reference(inputs))


def call_and_wait(call):
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("title, name", [(title, name) for title, case in CASES.items()
                                         for name in case.implementations])
def test_speed(benchmark, title, name):
    benchmark.group = title
    call, _, note = CASES[title].attempt(CASES[title].implementations[name], *prepared(title))
    if call is None:
        pytest.skip(note)
    benchmark(call_and_wait, call)
