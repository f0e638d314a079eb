"""The shapes and dtypes of the benchmarks, for the quick selection and for the full list. The inputs are those of the
tests."""

import dataclasses

import torch

from tests import cases as shared
from tests.cases import GPT2, LLAMA, QWEN, token_inputs

__all__ = [
    "GAMMA",
    "LAM",
    "LOGIT_DTYPES",
    "STEPS",
    "Step",
    "head_shape",
    "linear_shapes",
    "logits_inputs",
    "logits_shapes",
    "token_inputs",
]

GAMMA, LAM = 1.0, 0.95  # TRL's defaults
# [rows, vocabulary] of the ops on logits: (selection, full list); fewer rows where a gradient makes a call much longer
_ON_CUDA = ([(8192, LLAMA)], [(8192, LLAMA), (8192, GPT2), (4096, QWEN), (512, LLAMA), (8192, 8192)])
_OTHERS = [(1024, 32000), (512, LLAMA), (512, QWEN), (64, GPT2), (1024, 8192)]
LOGITS = {"cpu": ([(1024, GPT2)], [(1024, GPT2), *_OTHERS]), "cuda": _ON_CUDA}
LOGITS_WITH_GRADIENT = {"cpu": ([(512, GPT2)], [(512, GPT2), *_OTHERS]), "cuda": _ON_CUDA}
LOGIT_DTYPES = (torch.float32, torch.bfloat16)
# [sequences, tokens, vocabulary] of a training minibatch's loss head
HEAD = {"cpu": (8, 32, GPT2), "cuda": (16, 512, LLAMA)}
# [rows, hidden size, vocabulary] of the head of the language model
LINEAR = {
    "cpu": ([(256, 768, GPT2)], [(256, 768, GPT2), (1024, 768, GPT2), (256, 256, LLAMA)]),
    "cuda": ([(8192, 2048, LLAMA)], [(8192, 2048, LLAMA), (8192, 4096, LLAMA), (1024, 768, GPT2)]),
}
MASKED_LINEAR = {"cpu": (1024, 768, GPT2), "cuda": (8192, 2048, GPT2)}  # of the full list, with rows that do not count
# for the cost of a call before any arithmetic: [sequences, tokens], [rows, vocabulary], [rows, hidden size,
# vocabulary], and the options of such a case
TINY_TOKENS, TINY_LOGITS, TINY_LINEAR = (8, 128), (1, 8), (1, 8, 8)
OVERHEAD = {"kind": "overhead", "with_compiled": False}
# {letter: (the fixed size, sizes of the varied one)}; the upper half of each range does not fit into a CPU's caches
SWEEPS = {
    "cpu": {
        "V": (512, (1000, 8000, 32000, GPT2, LLAMA, QWEN)),
        "N": (GPT2, (1, 8, 64, 256, 512, 1024)),
        "T": (64, (16, 64, 256, 1024, 4096, 8192)),
    },
    "cuda": {
        "V": (4096, (1000, 8000, 32000, GPT2, LLAMA, QWEN)),
        "N": (LLAMA, (1, 8, 64, 512, 1024, 8192)),
        "T": (64, (16, 64, 256, 1024, 4096, 8192)),
    },
}


def logits_inputs(shape, dtype, device):
    """As in the tests, but a single row is one of those that are not peaked: its log-probability would be near 0, and a
    relative error of that means nothing."""
    if shape[0] != 1:
        return shared.logits_inputs(shape, dtype, device)
    return {name: x[1:] for name, x in shared.logits_inputs((2, *shape[1:]), dtype, device).items()}


@dataclasses.dataclass(frozen=True)
class Step:
    """A whole PPO step: the batch, which is one minibatch, and the GPT-2 that it trains."""

    name: str
    batch_size: int
    tokens: int  # of query and response together
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    query: float = 0.25  # the query's share of the tokens


STEPS = (
    Step("2 layers of 128", 4, 64, GPT2, 128, 2, 4),
    Step("GPT-2 small", 4, 64, GPT2, 768, 12, 12),
    Step("2 layers of 128, long", 8, 256, GPT2, 128, 2, 4),
    Step("GPT-2 small, long query", 4, 256, GPT2, 768, 12, 12, query=0.75),
    Step("GPT-2 small, long", 8, 256, GPT2, 768, 12, 12),
)


def logits_shapes(device, full, with_gradient):
    return (LOGITS_WITH_GRADIENT if with_gradient else LOGITS)[device.type][full]


def head_shape(device):
    return HEAD[device.type]


def linear_shapes(device, full):
    return LINEAR[device.type][full]
