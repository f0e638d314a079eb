"""kl_rewards: per-token KL, penalty and the score at the last token. Floor: 5 arrays and the mask.

Reads logprobs and ref_logprobs, 8 bytes per token, and the int64 mask; writes rewards, non_score_rewards and kls, 12.
Compared where the mask counts: elsewhere TRL computes a penalty for tokens that are no response, and we give 0.
"""

import torch

import ppo_ext
from ppo_ext import reference

from . import cases, trl_baseline
from .bench_gae import masked_in
from .suite import OURS, Case, Implementation, in_float64
from .timing import Traffic


def run(inputs, op):
    return op(inputs["scores"], inputs["logprobs"], inputs["ref_logprobs"], inputs["mask"])


def _with_coef(op):
    return lambda *inputs: op(*inputs, kl_coef=trl_baseline.KL_COEF)


def suite(device, full):
    ours, exact = _with_coef(ppo_ext.kl_rewards), _with_coef(reference.kl_rewards)
    for shape in cases.token_shapes("rewards", full):
        tokens = shape[0] * shape[1]
        trl = trl_baseline.baselines(run, lambda trl: trl.compute_rewards)
        trl[trl_baseline.COMPILED] = "torch.compile unrolls the loop over rows, with a graph break in each"
        yield Case(
            "kl_rewards", "forward", shape, torch.float32,
            make=lambda device, shape=shape: cases.token_inputs(shape, device),
            reference=lambda inputs: run(in_float64(inputs), exact),
            implementations={OURS: Implementation(lambda inputs: run(inputs, ours)), **trl},
            select=masked_in, traffic=Traffic(read=4 * tokens, copy=12 * tokens))
