"""SkyRL: its policy loss, without its imports, which need ray."""

import functools
import types

import torch

from . import Offer, Peer, wheels
from .excerpt import definitions

_FOLDER = "skyrl/backends/skyrl_train/utils"


def _load(device):
    torch_utils = definitions(
        wheels.text("skyrl", f"{_FOLDER}/torch_utils.py"), ("masked_mean", "safe_exp_delta"), torch=torch
    )
    correction = definitions(
        wheels.text("skyrl", f"{_FOLDER}/off_policy_correction_utils.py"), ("apply_off_policy_correction",), torch=torch
    )
    source = wheels.text("skyrl", f"{_FOLDER}/ppo_utils.py")
    scope = vars(torch_utils) | vars(correction) | {"torch": torch}
    policy_loss = definitions(source, ("ppo_policy_loss", "reduce_loss"), **scope).ppo_policy_loss
    config = types.SimpleNamespace(
        policy_loss_type="dual_clip", eps_clip_low=0.2, eps_clip_high=0.28, clip_ratio_c=3.0, off_policy_correction=None
    )

    def loss(logprobs, old_logprobs, advantages, mask):
        scaled = advantages / mask.sum().clamp(min=1)  # its losses are sums; its trainer divides the advantages first
        return policy_loss(logprobs, old_logprobs, scaled, config, loss_mask=mask)[0]

    return {"ppo_loss+dual_clip": {PEER.name: Offer(loss)}}


PEER = Peer("SkyRL", ("ppo_loss+dual_clip",), wheels.HOW, _load, functools.partial(wheels.version, "skyrl"))
