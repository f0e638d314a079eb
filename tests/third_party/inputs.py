"""Tiny Llama models, a tokenizer and data on disk. Run by the environment's python: `python inputs.py FOLDER`."""

import json
import pathlib
import random
import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(45)]


def tokenizer():
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{word: 3 + i for i, word in enumerate(WORDS)}}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    built = LlamaForCausalLM(config)
    for parameter in built.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)  # the usual initialisation is close to uniform, where nothing would differ
    return built


def text(generator, low, high):
    return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))


def write(folder):
    for name, seed in (("policy", 0), ("reward_base", 1)):
        model(seed).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    generator = random.Random(0)
    prompts = [{"instruction": text(generator, 2, 6), "input": "", "output": text(generator, 2, 4)} for _ in range(48)]
    pairs = [{**prompt, "chosen": text(generator, 3, 6), "rejected": text(generator, 3, 6)} for prompt in prompts]
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "prompts": {"file_name": "prompts.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
    }
    for name, content in (("prompts", prompts), ("pairs", pairs), ("dataset_info", info)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]))
