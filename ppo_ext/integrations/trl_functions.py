"""What TRL's trainers call in place of TRL's own functions: the same arguments and results, computed by ppo_ext's ops."""

import functools
import inspect
from collections.abc import Callable

import torch

from ..ops.linear_logprobs import linear_statistics
from ..ops.logprobs import logprobs, logprobs_and_entropy

# In the order of TRL's results; without a list of outputs, as up to TRL 1.14, it returns the first two.
_FIELDS = ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def selective_log_softmax(original: Callable) -> Callable:
    """In place of TRL's, with results in float32 for logits in half precision too."""

    @functools.wraps(original)
    def replacement(logits, index, temperature=1.0, row_mask=None):
        if index.dim() == logits.dim():  # several ids per row, for top-k distillation: one pass over the row suffices
            more = {} if temperature == 1.0 and row_mask is None else {"temperature": temperature, "row_mask": row_mask}
            return original(logits, index, **more)
        return logprobs(logits, index, temperature=temperature, mask=row_mask)

    return replacement


def entropy_from_logits(original: Callable) -> Callable:
    """In place of TRL's, with results in float32, and 0 log 0 = 0 where TRL's gives NaN for a logit of -inf."""

    @functools.wraps(original)
    def replacement(logits, chunk_size=128):
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        return logprobs_and_entropy(logits, labels)[1]

    return replacement


def selective_log_softmax_and_entropy(original: Callable) -> Callable:
    """In place of TRL's, from one read of the logits."""

    @functools.wraps(original)
    def replacement(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
        selected, entropy = logprobs_and_entropy(logits, index, temperature=temperature, mask=row_mask)
        return selected, entropy if entropy_requires_grad else entropy.detach()

    return replacement


class ChunkedLogProbFunction:
    """In place of TRL's autograd function of that name: log-probabilities straight from the hidden states.

    `parameters` are the names of the original's arguments; which there are, and how many results, differs between
    releases. Weights that ZeRO-3 has partitioned are given to the original, which gathers them again for the backward
    pass.
    """

    def __init__(self, original, parameters: list[str]) -> None:
        self.original, self.parameters = original, parameters

    def apply(self, *arguments):
        given = dict(zip(self.parameters, arguments, strict=False))
        if hasattr(given["weight"], "ds_id") and self.original is not None:
            return self.original.apply(*arguments)
        hidden, weight, bias = _autocast(given["hidden"], given["weight"], given.get("bias"))
        outputs = given.get("outputs", _FIELDS[1:] if "outputs" in self.parameters else ("entropy",))
        scale = given.get("logit_scale", 1.0)
        result = linear_statistics(
            hidden,
            weight,
            given["targets"],
            bias=bias,
            temperature=given["temperature"],
            logit_scale=scale,
            softcap=given.get("final_logit_softcapping"),
            outputs=("logprobs", *(name for name in _FIELDS[1:] if name in outputs)),
        )
        if result.is_top1 is not None:
            result = result._replace(is_top1=result.is_top1.bool())
        count = len(_FIELDS) if "outputs" in self.parameters else 2
        return tuple(getattr(result, name) for name in _FIELDS[:count])


def _autocast(*tensors):
    """The tensors in autocast's dtype, as torch's own matrix products would take them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def chunked_parameters(original) -> list[str]:
    """The names of the arguments of TRL's ChunkedLogProbFunction.apply; None stands for TRL 1.15 without Triton."""
    if original is None:
        return ["hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
                "logit_scale", "outputs"]  # fmt: skip
    names = list(inspect.signature(original.forward).parameters)[1:]  # without ctx
    return ["hidden" if name == "last_hidden" else name for name in names]
