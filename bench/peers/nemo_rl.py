"""NeMo-RL: a policy loss that no package brings."""

from . import Peer, Unavailable

_HOW = "pip install git+https://github.com/NVIDIA-NeMo/RL (its package on PyPI is empty)"


def _load(device):
    raise Unavailable("needs a clone with its cluster dependencies, as its package on PyPI is empty")


PEER = Peer("NeMo-RL", ("ppo_loss+dual_clip",), _HOW, _load, lambda: "")
