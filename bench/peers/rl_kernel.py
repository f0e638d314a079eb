"""RL-Kernel: log-probabilities from logits and from hidden states, in CUDA; plain torch where there is no GPU."""

from . import Offer, Peer, installed

_HOW = "pip install git+https://github.com/RL-Align/RL-Kernel (it is not on PyPI)"


def _load(device):
    from rl_engine.kernels.registry import kernel_registry

    return {
        "logprobs": {PEER.name: Offer(kernel_registry.get_op("logp").apply_fp32)},
        "linear_logprobs": {PEER.name: Offer(kernel_registry.get_op("linear_logp"))},
    }


PEER = Peer("RL-Kernel", ("logprobs", "linear_logprobs"), _HOW, _load, installed("RL-Kernel"))
