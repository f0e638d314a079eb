"""kl_rewards: the KL estimate and penalty of each token, and the score at the last one. Floor: 5 arrays and the mask.

Reads logprobs and ref_logprobs, 8 bytes for each token, and the int64 mask; writes rewards, non_score_rewards and kls,
12 bytes. Results are compared where the mask counts: at other tokens TRL computes a penalty too, and ours are 0.
"""

import torch

import ppo_ext
from ppo_ext.ops import reference

from . import cases, peers
from .bench_gae import masked_in
from .passes import FORWARD, Op, Operators
from .suite import OURS, Case, in_float64
from .timing import Traffic
from .trl_baseline import KL_COEF

_INPUTS = ("scores", "logprobs", "ref_logprobs", "mask")
OPS = {"kl_rewards": Op(lambda inputs, op: op(*(inputs[name] for name in _INPUTS)), options={"kl_coef": KL_COEF})}
OPERATORS = {
    "kl_rewards": Operators(
        lambda x: torch.ops.ppo_ext._kl_rewards.default(*(x[name] for name in _INPUTS), KL_COEF, 0), 3
    )
}
SHAPES = ([(64, 512)], [(64, 512), (8, 128), (512, 1024)])  # [B, T] of the selection and of the full list


def case(shape, device, *, kind="speed", with_compiled=True):
    op = OPS["kl_rewards"]
    tokens = shape[0] * shape[1]
    return Case(
        "kl_rewards",
        FORWARD,
        shape,
        torch.float32,
        make=lambda device: cases.token_inputs(shape, device),
        reference=lambda inputs: op.forward(in_float64(inputs), op.of(reference, "kl_rewards")),
        implementations={
            OURS: op.implementation(FORWARD, op.of(ppo_ext, "kl_rewards")),
            **peers.implementations("kl_rewards", op, FORWARD, device, with_compiled=with_compiled),
        },
        select=masked_in,
        traffic=Traffic(read=4 * tokens, copy=12 * tokens),
        kind=kind,
        capturable=True,
    )


def suite(device, full):
    for shape in SHAPES[full]:
        yield case(shape, device)


def tiny_cases(device):
    yield case(cases.TINY_TOKENS, device, **cases.OVERHEAD)
