"""The demo's text: Python's own language reference as prose paragraphs, or a file of the user's."""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..display import Display
from ..text import read_text

EOS, PAD = "<|endoftext|>", "<|pad|>"
MIN_CHARACTERS = 4000  # less text is too little for a tokenizer and for held-out prompts
MIN_TOKENS = 64
BATCH = 500  # paragraphs encoded between two moves of the progress bar
PROMPT_TOKENS = 500_000  # prompts come from the first so many tokens; the paragraphs are in random order
_RULE = re.compile(r"\s*[*=~^+|-]{3,}[-+=|* ]*")


class Corpus(NamedTuple):
    """Token ids of one text, split by paragraph, so that no held-out paragraph is trained on."""

    tokenizer: PreTrainedTokenizerFast
    train: torch.Tensor  # [N] int64
    held_out: torch.Tensor  # [M] int64


def python_reference() -> list[str]:
    """Prose paragraphs of the Python language reference, from the standard library's `pydoc_data.topics`."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "demo: this Python must have the standard module pydoc_data.topics, got an installation without it; "
            "pass your own text with --corpus FILE"
        ) from error
    found = (_prose(p) for topic in sorted(topics) for p in re.split(r"\n\s*\n", topics[topic]))
    return list(dict.fromkeys(p for p in found if p))  # the reference repeats itself across topics


def _prose(block: str) -> str | None:
    """A block as one line of prose, or None for code, grammar, tables and headings."""
    lines = block.strip("\n").split("\n")
    if any(_RULE.fullmatch(line) for line in lines):
        return None
    text = re.sub(r'[*"]', "", " ".join(lines))
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"^(\[\d+\]|\d+\.|-|•)\s+", "", text)
    letters = sum(c.isalpha() or c == " " for c in text) / max(len(text), 1)
    is_prose = len(text) >= 60 and letters >= 0.88 and re.search(r"[.:!?]\)?$", text)
    return text if is_prose and ">>>" not in text and "::=" not in text else None


def read_paragraphs(path: Path) -> list[str]:
    """Paragraphs of a UTF-8 text file: blocks between blank lines, or single lines where it has few blank lines."""
    text = read_text(path)
    for pattern in (r"\n\s*\n", r"\n", r"(?<=[.!?])\s+"):
        paragraphs = [re.sub(r"\s+", " ", p).strip() for p in re.split(pattern, text)]
        paragraphs = list(dict.fromkeys(p for p in paragraphs if p))
        if len(paragraphs) >= 20:
            break
    characters = sum(map(len, paragraphs))
    if len(paragraphs) < 20 or characters < MIN_CHARACTERS:
        raise ValueError(
            f"demo: --corpus must hold at least 20 different paragraphs, lines or sentences and {MIN_CHARACTERS} "
            f"characters, got {len(paragraphs)} and {characters} in {path}"
        )
    return paragraphs


def train_tokenizer(paragraphs: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the paragraphs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, padding_side="left")


def build_corpus(
    paragraphs: list[str], vocab_size: int, held_out_fraction: float, seed: int, display: Display
) -> Corpus:
    """Splits paragraphs at random, trains the tokenizer on the training part and encodes both parts."""
    order = torch.randperm(len(paragraphs), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = max(1, round(held_out_fraction * len(paragraphs)))
    train = [paragraphs[i] for i in order[cut:]]
    held_out = [paragraphs[i] for i in order[:cut]]
    with display.bar("tokenizer", len(train)) as advance:
        tokenizer = train_tokenizer(_counted(train, advance), vocab_size)
    with display.bar("encoding", len(paragraphs)) as advance:
        corpus = Corpus(tokenizer, _stream(tokenizer, train, advance), _stream(tokenizer, held_out, advance))
    shortest = min(len(corpus.train), len(corpus.held_out))
    if shortest < MIN_TOKENS:
        raise ValueError(
            f"demo: --corpus must give at least {MIN_TOKENS} tokens for training and held out, got {shortest}; "
            "use a longer text or more even paragraphs"
        )
    return corpus


def _counted(paragraphs: list[str], advance: Callable[..., None]) -> Iterator[str]:
    for start in range(0, len(paragraphs), BATCH):
        batch = paragraphs[start : start + BATCH]
        yield from batch
        advance(by=len(batch))


def _stream(tokenizer: PreTrainedTokenizerFast, paragraphs: list[str], advance: Callable[..., None]) -> torch.Tensor:
    parts = []
    for start in range(0, len(paragraphs), BATCH):
        batch = paragraphs[start : start + BATCH]
        ids = tokenizer([p + "\n" for p in batch])["input_ids"]
        parts.append(torch.tensor([token for paragraph in ids for token in paragraph], dtype=torch.long))
        advance(by=len(batch))
    return torch.cat(parts)


def windows(stream: torch.Tensor, length: int, stride: int) -> list[torch.Tensor]:
    """Every `stride`-th window of `length` tokens; the whole stream where it is shorter."""
    if len(stream) <= length:
        return [stream]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, stride)]


def prompts(corpus: Corpus, stream: torch.Tensor, length: int, count: int, seed: int) -> list[torch.Tensor]:
    """`count` prompts of `length` tokens, from the start of a clause to the end of a word.

    In a text with few such places a prompt may start at any word and, if there are few of those too, at any token. A
    prompt is repeated only when all others have been used as often.
    """
    stream = stream[:PROMPT_TOKENS]
    pieces = list(corpus.tokenizer.convert_ids_to_tokens(stream.tolist()))
    anywhere = range(max(len(stream) - length, 1))
    words = [i for i in anywhere if _starts_word(pieces, i) and _starts_word(pieces, i + length)]
    clauses = [i for i in words if i == 0 or pieces[i - 1].endswith(tuple(".?!,;:Ċ"))]
    starts = next((s for s in (clauses, words) if len(s) >= min(count, 256)), anywhere)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(starts), generator=generator) for _ in range(-(-count // len(starts)))])
    return [stream[starts[i] : starts[i] + length] for i in order[:count].tolist()]


def _starts_word(pieces: list[str], i: int) -> bool:
    # Byte-level BPE writes a space as Ġ and a line break as Ċ.
    return i == 0 or pieces[i - 1].endswith("Ċ") or pieces[i].startswith("Ġ")
