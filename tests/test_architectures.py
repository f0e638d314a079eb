"""A selection of the architectures that `make architectures` tries, and its kept table."""

import os

import pytest

from tests.architectures import __main__ as architectures
from tests.architectures import checks, pages, tiny

# one of each kind: learned, rotary and alibi positions, experts, a state space, windows, encoder-decoders of both
# positions
SELECTION = [
    ("gpt2", tiny.CAUSAL),
    ("llama", tiny.CAUSAL),
    ("bloom", tiny.CAUSAL),
    ("qwen3_moe", tiny.CAUSAL),
    ("mamba", tiny.CAUSAL),
    ("gemma3_text", tiny.CAUSAL),
    ("t5", tiny.SEQ2SEQ),
    ("bart", tiny.SEQ2SEQ),
]


def kept_row(name, kind):
    [row] = [row for row in pages.load()["rows"] if (row["model_type"], row["kind"]) == (name, kind)]
    return row


@pytest.mark.parametrize("name, kind", SELECTION)
def test_what_the_table_says_holds(name, kind):
    row = kept_row(name, kind)
    passing = [check for check, found in row["checks"].items() if found == "ok"]
    assert len(passing) >= len(checks.CHECKS) - 2
    found = checks.run(checks.Subject(tiny.build(name, kind), kind), passing)
    assert found == dict.fromkeys(passing, "ok")


def test_a_check_that_fails_is_a_sentence():
    subject = checks.Subject(tiny.build("gpt2", tiny.CAUSAL), tiny.CAUSAL)
    subject.base.transformer.wte.weight.data[:] = float("nan")
    found = checks.run(subject, ["right pads", "save"])
    assert found["right pads"] != "ok" and found["save"] != "ok"


def test_a_weight_that_stands_still_is_seen(monkeypatch):
    subject = checks.Subject(tiny.build("gpt2", tiny.CAUSAL), tiny.CAUSAL)
    trainer = subject.trainer()
    trainer.optimizer.param_groups[0]["params"].pop(3)
    with pytest.raises(AssertionError, match="1 weights do not move, pretrained_model.transformer.h.0"):
        checks._step(trainer, subject)


def test_a_crash_and_an_endless_loop_are_rows(monkeypatch):
    monkeypatch.setattr(tiny, "build", lambda *_: os.abort())
    assert "the process ended" in architectures.run("gpt2", tiny.CAUSAL)["reason"]
    monkeypatch.setattr(tiny, "build", lambda *_: __import__("time").sleep(60))
    assert architectures.run("gpt2", tiny.CAUSAL, seconds=0.2)["reason"] == "no end after 0.2 seconds"


def test_every_architecture_of_this_transformers_is_in_the_table():
    import transformers

    report = pages.load()
    if report["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {report['transformers']}")
    assert {(row["model_type"], row["kind"]) for row in report["rows"]} == set(tiny.architectures())


def test_the_kept_page_is_of_the_kept_table():
    assert pages.PAGE.read_text() == pages.markdown(pages.load())
