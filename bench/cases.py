"""Shapes and dtypes of every benchmark, the quick selection and the full list; the inputs are those of the tests."""

import torch

from tests.cases import GPT2, LLAMA, QWEN, logits_inputs, token_inputs

__all__ = ["LOGIT_DTYPES", "STEP", "head_shape", "logits_inputs", "logits_shapes", "token_inputs", "token_shapes"]

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
STEP = (4, 64, GPT2)  # [batch size, tokens of query and response, vocabulary] of a whole PPO step


def logits_shapes(device, full):
    return LOGITS[device.type][full]


def token_shapes(op, full):
    return TOKENS[op][full]


def head_shape(device):
    return HEAD[device.type]
