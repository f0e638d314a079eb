"""Parts of the three-stage demo on hand-checked input: reading ease, votes, the text and its prompts, the gate."""

import pytest
import torch

from ppo_ext.demo.display import Display
from ppo_ext.demo.figures import distinct_2, interval
from ppo_ext.demo.rlhf import corpus, gold, report
from ppo_ext.demo.rlhf.flesch import flesch, syllables


@pytest.mark.parametrize(
    ("text", "words", "sentences", "count"),
    [
        ("The cat sat on the mat.", 6, 1, 6),
        ("This sentence, taken as a reading passage unto itself, is being used to prove a point.", 16, 1, 23),
        ("Functions return values. Classes do not!", 6, 2, 10),
        ("no end mark", 3, 1, 3),
    ],
)
def test_flesch_on_hand_counted_sentences(text, words, sentences, count):
    assert flesch(text) == pytest.approx(206.835 - 1.015 * words / sentences - 84.6 * count / words)


def test_flesch_of_text_without_words_is_zero():
    assert flesch("") == flesch("* * * 12 [[") == 0.0


@pytest.mark.parametrize(
    ("word", "count"),
    [("prove", 1), ("table", 2), ("used", 1), ("added", 2), ("classes", 2), ("makes", 1), ("being", 2), ("created", 3),
     ("function", 2), ("special", 2), ("variable", 4), ("previous", 3), ("identifier", 5), ("the", 1)],
)  # fmt: skip
def test_syllables(word, count):
    assert syllables(word) == count


def test_votes_follow_the_logistic_law():
    first, second = torch.full((20_000,), 10.0).double(), torch.zeros(20_000).double()
    votes = gold.flesch_metric().prefer_first(first, second, torch.Generator().manual_seed(0))
    assert votes.double().mean().item() == pytest.approx(1 / (1 + 2.718281828**-1), abs=0.01)


def test_distinct_2_and_interval():
    assert distinct_2(["a b a b", "a b"]) == pytest.approx(2 / 4)
    assert distinct_2(["", "one"]) == 0.0
    assert interval(torch.tensor([1.0, 3.0])) == pytest.approx(1.96 * 2**0.5 / 2**0.5)


def test_the_built_in_text_is_prose_without_repeats():
    paragraphs = corpus.python_reference()
    assert len(paragraphs) > 900
    assert len(set(paragraphs)) == len(paragraphs)
    assert not any(">>>" in p or "::=" in p or "\n" in p or "***" in p for p in paragraphs)


def test_prompts_start_and_end_at_words_and_held_out_text_is_not_trained_on():
    paragraphs = corpus.python_reference()
    text = corpus.build_corpus(paragraphs, 512, 0.2, 0, Display())
    asked = corpus.prompts(text, text.held_out, 12, 40, seed=1)
    assert {len(p) for p in asked} == {12}
    assert len({tuple(p.tolist()) for p in asked}) == 40
    train = text.tokenizer.decode(text.train)
    assert sum(text.tokenizer.decode(p) in train for p in asked) < 10  # some phrases do occur in several paragraphs
    held_out = text.tokenizer.decode(text.held_out).split("\n")
    assert not set(held_out) & set(train.split("\n")) - {""}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--corpus must be a readable file, got .*No such file"),
        (b"", r"--corpus must hold at least 20 different .* got 0 and 0"),
        (b"Too short. " * 900, r"--corpus must hold at least 20 different .* got 1 and 10"),
        (
            b"caf\xe9 " * 900,
            r"--corpus must be UTF-8 text, got .* with byte 0xe9 at position 3; .* iconv -f WINDOWS-1252 -t UTF-8 ",
        ),
        (
            b"\xff\xfe" + "caf\xe9".encode("utf-16-le"),
            r"--corpus must be UTF-8 text, got .* with byte 0xff at position 0; .* -f UTF-16 -t UTF-8 '.*a text.txt' > ",
        ),
    ],
)
def test_bad_corpora_are_named(tmp_path, content, message):
    path = tmp_path / "a text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpus.read_paragraphs(path)


def test_a_corpus_with_too_little_to_hold_out_is_named():
    paragraphs = ["word " * 2000] + [f"w{i}" for i in range(30)]
    with pytest.raises(ValueError, match="--corpus must give at least 64 tokens for training and held out, got"):
        corpus.build_corpus(paragraphs, 400, 0.1, 0, Display())


def test_gate_lines():
    stages = {
        "before": {"gold": 50.0, "gold_ci": 3.0, "ref_nll": 3.7},
        "ppo": {"gold": 62.0, "gold_ci": 3.0, "ref_nll": 4.2, "kl": 10.0, "distinct_2": 0.5},
        "reward": {"accuracy": 0.6},
    }
    assert all(check.passed for check in report.gate(stages))
    worse = {"gold": 55.9, "ref_nll": 4.21, "kl": 10.1, "distinct_2": 0.49}
    failed = report.gate(stages | {"ppo": stages["ppo"] | worse, "reward": {"accuracy": 0.59}})
    assert not any(check.passed for check in failed)


def test_a_byte_order_mark_is_no_text(tmp_path):
    sentences = "\n".join(f"Sentence number {i} is here to be one of many others of its kind." * 4 for i in range(30))
    (tmp_path / "text.txt").write_text(sentences, encoding="utf-8-sig")
    assert corpus.read_paragraphs(tmp_path / "text.txt")[0].startswith("Sentence")
