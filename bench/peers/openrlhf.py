"""OpenRLHF: its policy loss, without its imports, which need deepspeed and flash_attn."""

import functools
from typing import Optional

import torch

from . import Offer, Peer, wheels
from .excerpt import definitions


def _load(device):
    scope = {"torch": torch, "nn": torch.nn, "Optional": Optional}
    mean = definitions(wheels.text("openrlhf", "openrlhf/models/utils.py"), ("masked_mean",), **scope).masked_mean
    source = wheels.text("openrlhf", "openrlhf/models/loss.py")
    losses = definitions(source, ("aggregate_loss", "PolicyLoss"), masked_mean=mean, **scope)
    policy_loss = losses.PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=3.0)

    def loss(logprobs, old_logprobs, advantages, mask):
        return policy_loss(logprobs, old_logprobs, advantages, action_mask=mask)[0]

    return {"ppo_loss+dual_clip": {PEER.name: Offer(loss)}}


PEER = Peer("OpenRLHF", ("ppo_loss+dual_clip",), wheels.HOW, _load, functools.partial(wheels.version, "openrlhf"))
