"""The selection under pytest-benchmark, to keep runs of one machine and compare later ones with them:

    pytest bench/test_speed.py -o addopts= --benchmark-autosave          # -k ppo_ext for our ops alone
    pytest bench/test_speed.py -o addopts= --benchmark-compare

The published numbers come from `python -m bench`, where the implementations take turns.
"""

import functools

import pytest
import torch

from . import command

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {case.title: case for case in command.suite(command.MODULES, DEVICE, False)}


@functools.lru_cache(maxsize=1)
def prepared(title):
    """(inputs, right results) of one case, kept while its implementations run one after the other."""
    torch.manual_seed(0)
    inputs = CASES[title].make(DEVICE)
    return inputs, CASES[title].select(inputs, CASES[title].reference(inputs))


def call_and_wait(call):
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize(
    "title, name", [(title, name) for title, case in CASES.items() for name in case.implementations]
)
def test_speed(benchmark, title, name):
    benchmark.group = title
    attempt = CASES[title].attempt(CASES[title].implementations[name], *prepared(title))
    if attempt.call is None:
        pytest.skip(attempt.note)
    benchmark(call_and_wait, attempt.call)
