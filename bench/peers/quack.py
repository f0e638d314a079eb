"""QuACK: cross entropy in CuTe DSL, which keeps a row in the shared memory of a cluster of blocks."""

from . import GPU_EXTRA, Offer, Peer, installed, need_gpu


def _load(device):
    need_gpu(device, GPU_EXTRA)
    from quack.cross_entropy import cross_entropy

    def logprobs(logits, labels):
        return -cross_entropy(logits, labels, reduction="none")

    def in_place(logits, labels):
        return -cross_entropy(logits, labels, reduction="none", inplace_backward=True)

    once = {"forward": "the same forward pass", "backward": "the gradient takes the place of the logits"}
    return {
        "logprobs": {
            PEER.name: Offer(logprobs),
            f"{PEER.name}, in place": Offer(in_place, destroys_logits=True, instead=once),
        }
    }


PEER = Peer("QuACK", ("logprobs",), GPU_EXTRA, _load, installed("quack-kernels"))
