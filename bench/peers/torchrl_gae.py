"""torchrl: generalised advantage estimation, vectorised as a convolution."""

import torch

from ..cases import GAMMA, LAM
from . import Offer, Peer, installed


def _load(device):
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def gae(values, rewards, mask):
        # torchrl has no mask, but zeros after the end of a sequence give the same, as in TRL
        values, rewards = values * mask, rewards * mask
        next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
        done = torch.zeros_like(values, dtype=torch.bool)
        advantages, returns = vec_generalized_advantage_estimate(
            GAMMA, LAM, *(x[..., None] for x in (values, next_values, rewards, done))
        )
        return advantages[..., 0], returns[..., 0]

    return {"gae": {PEER.name: Offer(gae)}}


PEER = Peer("torchrl", ("gae",), "pip install '.[bench]'", _load, installed("torchrl"))
