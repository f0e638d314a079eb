"""kl_rewards: per-token KL, penalty and the score at the last token. Floor: 5 arrays and the mask.

Reads logprobs and ref_logprobs, 8 bytes per token, and the int64 mask; writes rewards, non_score_rewards and kls, 12.
Compared where the mask counts: elsewhere TRL computes a penalty for tokens that are no response, and we give 0.
"""

import functools

import torch

import ppo_ext
from ppo_ext.ops import reference

from . import cases, peers
from .bench_gae import masked_in
from .passes import FORWARD, Op
from .suite import OURS, Case, in_float64
from .timing import Traffic
from .trl_baseline import KL_COEF

OP = Op(lambda inputs, op: op(inputs["scores"], inputs["logprobs"], inputs["ref_logprobs"], inputs["mask"]))


def case(shape, device, *, kind="speed", with_compiled=True):
    ours, exact = (functools.partial(library.kl_rewards, kl_coef=KL_COEF) for library in (ppo_ext, reference))
    tokens = shape[0] * shape[1]
    return Case(
        "kl_rewards",
        FORWARD,
        shape,
        torch.float32,
        make=lambda device: cases.token_inputs(shape, device),
        reference=lambda inputs: OP.forward(in_float64(inputs), exact),
        implementations={
            OURS: OP.implementation(FORWARD, ours),
            **peers.implementations("kl_rewards", OP, FORWARD, device, with_compiled=with_compiled),
        },
        select=masked_in,
        traffic=Traffic(read=4 * tokens, copy=12 * tokens),
        kind=kind,
        capturable=True,
    )


def suite(device, full):
    for shape in cases.token_shapes("kl_rewards", full):
        yield case(shape, device)
