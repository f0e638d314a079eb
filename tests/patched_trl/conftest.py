"""Counts the calls of ppo_ext's ops that the replacements make, so that a test can tell that they were in use."""

import pytest

from ppo_ext.integrations import trl_functions


@pytest.fixture
def calls(monkeypatch):
    counts = {"count": 0}

    def counted(function):
        def call(*arguments, **keywords):
            counts["count"] += 1
            return function(*arguments, **keywords)

        return call

    for name in ("logprobs", "logprobs_and_entropy", "linear_statistics"):
        monkeypatch.setattr(trl_functions, name, counted(getattr(trl_functions, name)))
    return counts
