"""How the cost grows with the vocabulary V and the rows N of logprobs_and_entropy, and with the tokens T of gae.

One size is varied while the others stay fixed; `fit.py` fits the exponent to the upper part of the range.
"""

import torch

from . import bench_gae, bench_logprobs, cases
from .passes import FORWARD


def case(letter, size, fixed, device):
    kind = f"sweep {letter}"
    if letter == "T":
        return bench_gae.case("gae", (fixed, size), device, kind=kind, with_compiled=False)
    shape = (fixed, size) if letter == "V" else (size, fixed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return bench_logprobs.case("logprobs_and_entropy", shape, dtype, FORWARD, device, kind=kind)


def suite(device, full):
    if full:
        for letter, (fixed, sizes) in cases.SWEEPS[device.type].items():
            for size in sizes:
                yield case(letter, size, fixed, device)
