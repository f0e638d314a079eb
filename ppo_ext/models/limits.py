"""What a model can read: the longest row of tokens and the ids of its vocabulary; and how it counts positions."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

# names of what makes positions: wpe, embed_positions, position_embeddings, pos_encoding, positions_embed, ...
_POSITIONS = re.compile(r"^wpe$|(^|_)pos(ition(al|s)?)?(_|$)")
# names of what is about distances, or about something else than tokens
_OTHERS = re.compile(r"(^|_)rel(ative)?(_|$)|vision|visual|image|audio|speech|patch")


class Limits(NamedTuple):
    """The longest row and the size of the vocabulary; None where there is no limit."""

    length: int | None  # tokens of a row; for an encoder-decoder model those that the decoder reads
    encoder_length: int | None  # likewise for its encoder
    vocabulary: int | None  # token ids lie in [0, vocabulary)
    vocabulary_of: str = "the vocabulary"  # what errors call it

    def with_another(self, other: "Limits", vocabulary_of: str) -> "Limits":
        """The limits of samples that another model has to read as well, whose vocabulary errors call `vocabulary_of`."""
        length = smallest(self.length, other.length)
        encoder_length = smallest(self.encoder_length, other.encoder_length)
        vocabulary = smallest(self.vocabulary, other.vocabulary)
        of = self.vocabulary_of if vocabulary == self.vocabulary else vocabulary_of
        return Limits(length, encoder_length, vocabulary, of)


NO_LIMITS = Limits(None, None, None)


def limits_of(model: Any) -> Limits:
    """The limits of a transformers or peft model, or of one with a value head.

    A row is too long only for a model with a table of positions, learned or computed, which has no entry for the next
    one. Rotary positions and alibi are computed for any position, and relative ones reach as far as one likes: their
    max_position_embeddings says how the model was trained and not what it can read.
    """
    model = getattr(model, "pretrained_model", model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return Limits(_longest(model.get_decoder()), _longest(model.get_encoder()), _vocabulary(model))
    return Limits(_longest(model), None, _vocabulary(model))


def smallest(a: int | None, b: int | None) -> int | None:
    """The smaller one of two limits."""
    return min((limit for limit in (a, b) if limit is not None), default=None)


def has_absolute_positions(model: nn.Module) -> bool:
    """Whether the model adds something to its embeddings that depends on where in a row a token stands."""
    return any(_is_of_positions(name) for name, _ in model.named_modules())


def first_position(model: nn.Module) -> int:
    """What the model's position_ids begin with: 0, or the entry after that of the padding, as in RoBERTa."""
    return max((_entries_of_padding(table) for table in _tables(model)), default=0)


def _longest(model: nn.Module) -> int | None:
    return min(_table_lengths(model), default=None)


def _table_lengths(model: nn.Module) -> Iterator[int]:
    for table in _tables(model):
        unused = max(_entries_of_padding(table), getattr(table, "offset", 0))  # BART and OPT have the attribute offset
        yield table.num_embeddings - unused
    for name, buffer in model.named_buffers():
        # GPT-J's angles [positions, 2] and BERT's position_ids [1, positions]; XGLM's table "weights" grows by itself
        if buffer.dim() == 2 and _is_of_positions(name) and _POSITIONS.search(name.rpartition(".")[2]):
            yield buffer.shape[0 if buffer.is_floating_point() else 1]
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) == "mpt":  # its alibi is made for these positions alone
        yield config.max_seq_len


def _tables(model: nn.Module) -> Iterator[nn.Embedding]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _is_of_positions(name):
            yield module


def _entries_of_padding(table: nn.Embedding) -> int:
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _is_of_positions(name: str) -> bool:
    parts = name.split(".")
    return any(_POSITIONS.search(part) for part in parts) and not any(_OTHERS.search(part) for part in parts)


def _vocabulary(model: Any) -> int | None:
    """Rows of the embedding, or of the head if those are fewer."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # of a model that hashes characters
        return None
    rows = getattr(embedding, "num_embeddings", None) or getattr(model.config, "vocab_size", None)
    return smallest(rows, getattr(model.get_output_embeddings(), "out_features", None))
