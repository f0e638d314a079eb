"""What --quick takes in the place of the packages: a random Llama, a reward and a metric that need no installation."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_model(target: Path, texts: list[str], seed: int) -> None:
    """A Llama of 2 layers with random weights and a byte-level tokenizer trained on the texts."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<eos>"]
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)


def letters(texts: list[str]) -> list[float]:
    """The share of ASCII letters in each text."""
    return [_share(text, str.isalpha) for text in texts]


def vowels(texts: list[str]) -> list[float]:
    """The share of vowels in each text."""
    return [_share(text, "aeiou".__contains__) for text in texts]


def _share(text: str, counts: Callable[[str], bool]) -> float:
    return sum(c.isascii() and counts(c) for c in text) / max(len(text), 1)
