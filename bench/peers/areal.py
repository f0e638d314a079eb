"""AReaL: its policy loss, without its imports, which need twenty other packages."""

import functools

import torch

from . import Offer, Peer, wheels
from .excerpt import definitions


def _load(device):
    source = wheels.text("areal", "areal/utils/functional/functional.py")
    actor_loss = definitions(source, ("ppo_actor_loss_fn",), torch=torch).ppo_actor_loss_fn

    def loss(logprobs, old_logprobs, advantages, mask):
        options = {"loss_mask": mask.bool(), "eps_clip_higher": 0.28, "c_clip": 3.0}
        return actor_loss(logprobs, old_logprobs, old_logprobs, advantages, 0.2, **options)[0]

    return {"ppo_loss+dual_clip": {PEER.name: Offer(loss)}}


PEER = Peer("AReaL", ("ppo_loss+dual_clip",), wheels.HOW, _load, functools.partial(wheels.version, "areal"))
