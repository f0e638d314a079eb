"""gae alone, and gae followed by whitening as in TRL's `compute_advantages`. Floor: 4 arrays and the mask.

Reads values and rewards, 8 bytes for each token, and the int64 mask; writes advantages and returns, 8 bytes for each
token. Results are compared where the mask counts: at other tokens TRL continues the recursion, and ours are 0.
"""

import torch

import ppo_ext
from ppo_ext.ops import reference

from . import cases, peers
from .passes import FORWARD, Op, Operators
from .suite import OURS, Case, in_float64
from .timing import Traffic

OPS = {
    "gae": Op(
        lambda inputs, op: op(inputs["values"], inputs["rewards"], inputs["mask"]),
        options={"gamma": cases.GAMMA, "lam": cases.LAM},
    )
}
OPERATORS = {
    "gae": Operators(
        lambda x: torch.ops.ppo_ext._gae.default(
            x["values"], x["rewards"], x["mask"], None, None, None, cases.GAMMA, cases.LAM, cases.LAM, False
        ),
        2,
    )
}
SHAPES = (
    [(64, 1024)],
    [(64, 1024), (64, 512), (8, 128), (512, 1024), (8, 8192)],
)  # [B, T] of the selection and of the full list


def masked_in(inputs, outputs):
    return [torch.where(inputs["mask"] != 0, x, 0.0) for x in outputs]


def alone(library):
    return OPS["gae"].of(library, "gae")


def with_whitening(library):
    def gae_and_whiten(values, rewards, mask):
        advantages, returns = alone(library)(values, rewards, mask)
        return library.masked_whiten(advantages, mask), returns

    return gae_and_whiten


def case(name, shape, device, *, kind="speed", with_compiled=True):
    of, tokens = {"gae": alone, "gae+masked_whiten": with_whitening}[name], shape[0] * shape[1]
    return Case(
        name,
        FORWARD,
        shape,
        torch.float32,
        make=lambda device: cases.token_inputs(shape, device),
        reference=lambda inputs: OPS["gae"].forward(in_float64(inputs), of(reference)),
        implementations={
            OURS: OPS["gae"].implementation(FORWARD, of(ppo_ext)),
            **peers.implementations(name, OPS["gae"], FORWARD, device, with_compiled=with_compiled),
        },
        select=masked_in,
        traffic=Traffic(read=8 * tokens, copy=8 * tokens),
        kind=kind,
        capturable=True,
    )


def suite(device, full):
    for shape in SHAPES[full]:
        yield case("gae", shape, device)
        yield case("gae+masked_whiten", shape, device)


def tiny_cases(device):
    yield case("gae", cases.TINY_TOKENS, device, **cases.OVERHEAD)
