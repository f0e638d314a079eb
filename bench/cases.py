"""Shapes and dtypes of every benchmark, the quick selection and the full list; the inputs are those of the tests."""

import dataclasses

import torch

from tests.cases import GPT2, LLAMA, QWEN, logits_inputs, token_inputs

__all__ = ["LOGIT_DTYPES", "STEPS", "head_shape", "logits_inputs", "logits_shapes", "token_inputs", "token_shapes"]

# [rows, vocabulary] of the ops on logits: (selection, full)
LOGITS = {"cpu": ([(1024, GPT2)], [(1024, GPT2), (512, LLAMA), (512, QWEN), (64, GPT2), (1024, 8192)]),
          "cuda": ([(8192, LLAMA)], [(8192, LLAMA), (8192, GPT2), (4096, QWEN), (512, LLAMA), (8192, 8192)])}
LOGIT_DTYPES = (torch.float32, torch.bfloat16)
# [sequences, tokens] of the ops on per-token tensors: (selection, full)
TOKENS = {"gae": ([(64, 512)], [(64, 512), (8, 128), (512, 1024), (8, 8192)]),
          "rewards": ([(64, 512)], [(64, 512), (8, 128), (512, 1024)]),
          "whiten": ([(64, 512)], [(64, 512), (8, 128), (512, 1024)]),
          "ppo_loss": ([(8, 512)], [(8, 512), (64, 512), (2, 64)])}
# [sequences, tokens, vocabulary] of a training minibatch's loss head
HEAD = {"cpu": (8, 128, GPT2), "cuda": (16, 512, LLAMA)}


@dataclasses.dataclass(frozen=True)
class Step:
    """A whole PPO step: the batch, one mini batch, and the GPT-2 it trains."""
    name: str
    batch_size: int
    tokens: int  # of query and response
    vocabulary: int
    hidden: int
    layers: int
    heads: int


STEPS = (Step("2 layers of 128", 4, 64, GPT2, 128, 2, 4), Step("GPT-2 small", 4, 64, GPT2, 768, 12, 12),
         Step("2 layers of 128, long", 8, 256, GPT2, 128, 2, 4))


def logits_shapes(device, full):
    return LOGITS[device.type][full]


def token_shapes(op, full):
    return TOKENS[op][full]


def head_shape(device):
    return HEAD[device.type]
