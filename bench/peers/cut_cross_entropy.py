"""Apple's cut-cross-entropy: the loss of a linear head without its logits, in Triton on a GPU and by torch.compile
elsewhere."""

from . import GPU_EXTRA, Offer, Peer, installed


def _load(device):
    from cut_cross_entropy import linear_cross_entropy

    def linear_logprobs(hidden, weight, labels):
        return -linear_cross_entropy(
            hidden, weight, labels, reduction="none", impl="cce" if device.type == "cuda" else "torch_compile"
        )

    return {"linear_logprobs": {PEER.name: Offer(linear_logprobs)}}


PEER = Peer("cut-cross-entropy", ("linear_logprobs",), GPU_EXTRA, _load, installed("cut-cross-entropy"))
