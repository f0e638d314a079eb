"""rl-triton: generalised advantage estimation as an associative scan in Triton."""

import torch

from ..cases import GAMMA, LAM
from . import Offer, Peer, installed, need_gpu

_HOW = "pip install git+https://github.com/simonsays1980/rl-triton (it is not on PyPI)"


def _load(device):
    need_gpu(device, _HOW)
    from rl_triton import compute_gae

    def gae(values, rewards, mask):
        values, rewards = (
            values * mask,
            rewards * mask,
        )  # it has no mask, but zeros after the end of a sequence give the same
        advantages = compute_gae(rewards, values, torch.zeros_like(values), gamma=GAMMA, lambda_=LAM)
        return advantages, advantages + values

    return {"gae": {PEER.name: Offer(gae)}}


PEER = Peer("rl-triton", ("gae",), _HOW, _load, installed("rl-triton"))
