"""The two numbers of a text: the reward that PPO trains on, and the held-out metric that it never sees."""

from typing import NamedTuple

from ..requirements import archive_path
from ..scorer import Scorer, load_function
from . import ratings, tiny

VADER, RATING = "VADER sentiment", "predicted human rating"


class Metrics(NamedTuple):
    """`reward` is trained on; `rating` only judges. `agreement`: correlation of each with people, on held-out sentences."""

    reward: Scorer
    rating: Scorer
    agreement: dict[str, float]


def load(scorer: str | None, quick: bool) -> Metrics:
    """VADER's compound score (MIT licence), or the user's function, and the rating model, fitted here in a second."""
    if quick:
        reward = Scorer(scorer, load_function(scorer)) if scorer else Scorer("letters", tiny.letters)
        return Metrics(reward, Scorer("vowels", tiny.vowels), {})
    reward = Scorer(scorer, load_function(scorer)) if scorer else Scorer(VADER, vader_compound())
    model, held_out = ratings.fit(ratings.read_ratings(archive_path()))
    rating = Scorer(RATING, model)
    texts = [sentence.text for sentence in held_out]
    agreement = {metric.name: ratings.correlation(metric(texts).tolist(), held_out) for metric in (reward, rating)}
    return Metrics(reward, rating, agreement)


def vader_compound():
    """VADER's compound score of each text: the sum of its words' valences s, as s / sqrt(s^2 + 15), from -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda texts: [analyzer.polarity_scores(text)["compound"] for text in texts]


def vader_valences() -> dict[str, float]:
    """The lexicon, to mark in a sample what the reward counted."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer().lexicon
