"""What a model can read: the longest row of tokens and the ids of its vocabulary."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

# the names of tables of positions: wpe, embed_positions, position_embeddings, pos_encoding, positions_embed, ...
_POSITIONS = re.compile(r"^wpe$|(^|_)pos(ition(al|s)?)?(_|$)")
_OTHERS = re.compile(r"(^|_)rel(ative)?(_|$)|vision|visual|image|audio|speech|patch")  # of distances, or not of tokens


class Limits(NamedTuple):
    """The longest row and the size of the vocabulary; None where there is no limit."""

    length: int | None  # tokens of a row; for an encoder-decoder model those that the decoder reads
    encoder_length: int | None  # likewise for its encoder
    vocabulary: int | None  # token ids lie in [0, vocabulary)
    vocabulary_of: str = "the vocabulary"  # what errors call it

    def with_reference(self, reference: "Limits") -> "Limits":
        """The limits of samples that the reference model has to read as well."""
        length = smallest(self.length, reference.length)
        encoder_length = smallest(self.encoder_length, reference.encoder_length)
        vocabulary = smallest(self.vocabulary, reference.vocabulary)
        of = self.vocabulary_of if vocabulary == self.vocabulary else "the reference model's vocabulary"
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
