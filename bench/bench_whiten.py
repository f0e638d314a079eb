"""masked_whiten: mean and variance over the counted tokens, then the scaled values. Floor: one array in, one out.

Reads the values, 4 bytes per token, and the int64 mask; writes 4. Compared where the mask counts.
"""

import torch

import ppo_ext
from ppo_ext import reference

from . import cases, trl_baseline
from .bench_gae import masked_in
from .suite import OURS, Case, Implementation, in_float64
from .timing import Traffic


def run(inputs, op):
    return (op(inputs["advantages"], inputs["mask"]),)


def suite(device, full):
    for shape in cases.token_shapes("whiten", full):
        tokens = shape[0] * shape[1]
        yield Case(
            "masked_whiten", "forward", shape, torch.float32,
            make=lambda device, shape=shape: cases.token_inputs(shape, device),
            reference=lambda inputs: run(in_float64(inputs), reference.masked_whiten),
            implementations={OURS: Implementation(lambda inputs: run(inputs, ppo_ext.masked_whiten)),
                             **trl_baseline.baselines(run, lambda trl: trl.masked_whiten)},
            select=masked_in, traffic=Traffic(read=8 * tokens, copy=4 * tokens))
