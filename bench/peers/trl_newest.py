"""The newest TRL: log-probabilities and entropy in one call (a Triton kernel on a GPU, torch on a CPU), and
log-probabilities straight from the hidden states."""

import functools

from . import Offer, Peer, wheels
from .trl_1_12 import as_batch

_WHEEL = "trl newest"


def _load(device):
    utils = wheels.under_own_name(_WHEEL, "trl", "trainer.utils")

    def logprobs(logits, labels):
        return utils.selective_log_softmax(as_batch(logits), as_batch(labels)).flatten()

    def logprobs_and_entropy(logits, labels):
        both = utils.selective_log_softmax_and_entropy(as_batch(logits), as_batch(labels))
        return tuple(x.flatten() for x in both)

    def linear_logprobs(hidden, weight, labels):
        chunk, no_softcapping, no_scale, nothing_else = utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        return utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, chunk, no_softcapping, no_scale, nothing_else
        )[0]

    offers = {
        "logprobs": Offer(logprobs),
        "logprobs_and_entropy": Offer(logprobs_and_entropy),
        "linear_logprobs": Offer(linear_logprobs),
    }
    return {op: {PEER.name: offer} for op, offer in offers.items()}


PEER = Peer(
    f"TRL {wheels.version(_WHEEL)}",
    ("logprobs", "logprobs_and_entropy", "linear_logprobs"),
    wheels.HOW,
    _load,
    functools.partial(wheels.version, _WHEEL),
)
