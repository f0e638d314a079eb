"""flash-linear-attention: its cross entropy in Triton, which is that of flash-attention."""

from . import GPU_EXTRA, Offer, Peer, installed, need_gpu


def _load(device):
    need_gpu(device, GPU_EXTRA)
    from fla.modules.fused_cross_entropy import cross_entropy_loss

    return {"logprobs": {PEER.name: Offer(lambda logits, labels: -cross_entropy_loss(logits, labels)[0])}}


PEER = Peer("flash-linear-attention", ("logprobs",), GPU_EXTRA, _load, installed("flash-linear-attention"))
