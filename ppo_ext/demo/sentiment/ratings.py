"""The held-out metric: how a person would rate a text, predicted from sentences that people rated.

The source distribution of vaderSentiment 3.3.2 (MIT licence) carries 14,313 sentences of film and product reviews, each
with the mean of about 20 people's ratings between -4 (extremely negative) and 4 (extremely positive); see C. Hutto and
E. Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis of social media text", ICWSM 2014. A ridge
regression on the sentences' words and word pairs learns to predict that mean. On sentences that it was not fitted to,
it agrees with people better than a lexicon does (`correlation` in summary.json). PPO never sees it.
"""

import hashlib
import io
import math
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TABLES = ("movieReviewSnippets_GroundTruth.txt", "amazonReviewSnippets_GroundTruth.txt")
HELD_OUT = 5  # every fifth sentence, of a random order, is kept for the correlation
RIDGE = 1.0  # 0.3 to 1 give the same correlation on held-out sentences, 3 and more a lower one
ITERATIONS = 60  # of conjugate gradients; the weights no longer change after about 50


class Rated(NamedTuple):
    """A sentence and the mean of its ratings."""

    text: str
    rating: float


def read_ratings(path: Path, sha256: str = SHA256) -> list[Rated]:
    """All rated sentences of the archive, after checking that it is the one this demo was made with."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"demo: {path} must have the SHA-256 {sha256}, got {found}; delete it and run make demo")
    inner = _member(content, INNER)
    tables = [_member(inner, f"hutto_ICWSM_2014/{name}") for name in TABLES]
    lines = [line for table in tables for line in table.decode("utf-8", errors="replace").splitlines()]
    columns = [line.split("\t") for line in lines]
    return [Rated(text, float(rating)) for _, rating, text in (row for row in columns if len(row) == 3)]


def _member(archive: bytes, name: str) -> bytes:
    """The content of one file of a tar archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        assert file is not None  # it is for a folder only
        return file.read()


class RatingModel:
    """Predicted mean rating of a text: bias + sum of its n-grams' weights / sqrt(number of its known n-grams).

    The n-grams are the text's different words, ends of sentences and pairs of neighbours that occur in at least two of
    the fitted sentences.
    """

    def __init__(self, sentences: list[Rated]):
        counts = Counter(gram for sentence in sentences for gram in n_grams(sentence.text))
        self.index = {gram: i for i, gram in enumerate(gram for gram, count in counts.items() if count >= 2)}
        ratings = np.array([sentence.rating for sentence in sentences])
        self.bias = ratings.mean()
        self.weights = self._fit([sentence.text for sentence in sentences], ratings - self.bias)

    def __call__(self, texts: list[str]) -> list[float]:
        known = [self._known(text) for text in texts]
        return [self.bias + self.weights[k].sum() / math.sqrt(max(len(k), 1)) for k in known]

    def _known(self, text: str) -> list[int]:
        return [self.index[gram] for gram in n_grams(text) if gram in self.index]

    def _fit(self, texts: list[str], targets: np.ndarray) -> np.ndarray:
        """The ridge regression's weights, by conjugate gradients on (A'A + RIDGE) w = A'y, A sparse."""
        known = [self._known(text) for text in texts]
        lengths = np.array([len(k) for k in known])
        columns = np.array([i for k in known for i in k], dtype=np.int64)
        rows = np.repeat(np.arange(len(known)), lengths)
        scale = 1 / np.sqrt(np.maximum(lengths, 1))

        def transposed(v):
            return np.bincount(columns, weights=(v * scale)[rows], minlength=len(self.index))

        def normal(w):
            return transposed(np.bincount(rows, weights=w[columns], minlength=len(known)) * scale) + RIDGE * w

        weights = np.zeros(len(self.index))
        residual = transposed(targets)
        direction, square = residual.copy(), residual @ residual
        for _ in range(ITERATIONS):
            image = normal(direction)
            step = square / (direction @ image)
            weights += step * direction
            residual = residual - step * image
            previous, square = square, residual @ residual
            if square < 1e-12:
                break
            direction = residual + square / previous * direction
        return weights


def n_grams(text: str) -> list[str]:
    """The different words, ends of sentences and pairs of neighbours of a text, in order of appearance."""
    words = re.findall(r"[a-z']+|[!?.]", text.lower())
    return list(dict.fromkeys([*words, *(f"{a} {b}" for a, b in zip(words, words[1:]))]))


def fit(sentences: list[Rated]) -> tuple[RatingModel, list[Rated]]:
    """A model fitted to four fifths of the sentences, and the other fifth, to see how well it predicts."""
    order = np.random.default_rng(0).permutation(len(sentences)).tolist()
    cut = len(order) // HELD_OUT
    return RatingModel([sentences[i] for i in order[cut:]]), [sentences[i] for i in order[:cut]]


def correlation(scores: list[float], sentences: list[Rated]) -> float:
    """Pearson's correlation of scores with the sentences' mean ratings."""
    return float(np.corrcoef(scores, [sentence.rating for sentence in sentences])[0, 1])
