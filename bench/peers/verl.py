"""verl: its clipped policy loss, and log-probabilities and entropy straight from hidden states; without its imports, which
need ray."""

import functools
import types
from typing import Optional

import torch

from . import Offer, Peer, wheels
from .excerpt import definitions

OPS = ("ppo_loss+dual_clip", "linear_logprobs", "linear_logprobs_and_entropy")


class _Config(dict):
    __getattr__ = dict.__getitem__


def _policy_loss():
    sums = definitions(
        wheels.text("verl", "verl/utils/torch_functional.py"), ("masked_sum", "masked_mean"), torch=torch
    )
    core = definitions(
        wheels.text("verl", "verl/trainer/ppo/core_algos.py"),
        ("agg_loss", "compute_policy_loss_vanilla"),
        torch=torch,
        verl_F=sums,
        AlgoConfig=types.SimpleNamespace,
    )
    config = _Config(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info={})

    def loss(logprobs, old_logprobs, advantages, mask):
        return core.compute_policy_loss_vanilla(old_logprobs, logprobs, advantages, mask, "token-mean", config)[0]

    return loss


def _fused_linear():
    names = ("_fused_linear_for_ppo_fwd", "_fused_linear_for_ppo_bwd", "FusedLinearForPPOFunction", "FusedLinearForPPO")
    scope = {"torch": torch, "Optional": Optional, "_FLASH_ATTN_CROSS_ENTROPY_AVAILABLE": False}
    source = wheels.text("verl", "verl/utils/experimental/torch_functional.py")
    return definitions(source, names, **scope).FusedLinearForPPO()


def _load(device):
    fused = _fused_linear()
    offers = {
        "ppo_loss+dual_clip": Offer(_policy_loss()),
        "linear_logprobs": Offer(lambda *head: fused(*head)[0]),
        "linear_logprobs_and_entropy": Offer(fused),
    }
    return {op: {PEER.name: offer} for op, offer in offers.items()}


PEER = Peer("verl", OPS, wheels.HOW, _load, functools.partial(wheels.version, "verl"))
