"""Liger-Kernel: cross entropy in Triton on a GPU, and log-probabilities straight from the hidden states on any device.

Its package depends on Triton, which a CPU does not need. The chunked loss is plain torch, so it is imported from the
wheel.
"""

from . import Offer, Peer, installed, wheels

_WHEEL = "liger"
_IN_FORWARD = "its forward pass has already computed the gradient"


def _load(device):
    if not installed("liger-kernel")():
        wheels.on_path(_WHEEL)
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    def chunked(hidden, weight, labels):
        return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, labels[None])[0]

    offers = {"linear_logprobs": {"Liger chunked_loss": Offer(chunked)}}
    if device.type != "cuda":
        return offers
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
    from liger_kernel.transformers.functional import liger_cross_entropy

    def logprobs(logits, labels):
        return -liger_cross_entropy(logits, labels, reduction="none")

    def scaled(hidden, weight, labels):
        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)

    offers["linear_logprobs"]["Liger scaled cross entropy"] = Offer(scaled)
    offers["logprobs"] = {PEER.name: Offer(logprobs, destroys_logits=True, instead={"backward": _IN_FORWARD})}
    return offers


def _version():
    return installed("liger-kernel")() or wheels.version(_WHEEL)


PEER = Peer("Liger", ("logprobs", "linear_logprobs"), wheels.HOW, _load, _version)
