"""Flesch reading ease, the gold metric of the demo.

    206.835 - 1.015 * words / sentences - 84.6 * syllables / words

Higher is easier: about 30 is academic prose, 60 to 70 is plain English, 121 is the top (one-syllable words).
The coefficients were fitted to human comprehension tests (R. Flesch, "A new readability yardstick", 1948).
Syllables are counted by rules instead of a dictionary, which is right for about nine words of ten.
"""

import re

_WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)?")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_VOWELS = re.compile(r"[aeiouy]+")
# Endings whose e is silent: "used", "makes", "prove"; not "added", "classes", "table".
_SILENT_E = re.compile(r"(?:[^aeiouydt]ed|[^aeiouyscgxzlh]es|[aeiouy][lh]es|[^aeiouyl]e|[aeiouy]le)$")
# Two neighbouring vowels in separate syllables: "being", "create", "reliable", "idea".
_HIATUS = re.compile(r"[aeiouy]ing|(?<![tscg])i[ao]|(?<![qg])ua|creat|idea|uou|[aeiou]ity|fier|iu")


def syllables(word: str) -> int:
    """The number of syllables of one English word, at least 1."""
    word = word.lower()
    count = len(_VOWELS.findall(word)) + len(_HIATUS.findall(word))
    if _SILENT_E.search(word):
        count -= 1
    return max(count, 1)


def flesch(text: str) -> float:
    """Flesch reading ease of a text; 0.0 if it has no word."""
    words = _WORD.findall(text)
    if not words:
        return 0.0
    sentences = max(len(_SENTENCE_END.findall(text.strip())), 1)
    return 206.835 - 1.015 * len(words) / sentences - 84.6 * sum(map(syllables, words)) / len(words)
