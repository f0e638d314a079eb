"""`ppo_loss` with options: checks what is given and runs the operator."""

from typing import Any

import torch

from . import _ppo_options, check, reference

_FLOATS = (
    "logprobs",
    "old_logprobs",
    "advantages",
    "vpreds",
    "values",
    "returns",
    "weights",
    "ref_logprobs",
    "entropy",
)
_OPTIONAL = ("weights", "ref_logprobs", "entropy")
_DIFFERENTIABLE = ("logprobs", "vpreds", "entropy")


def _prepare(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of tokens that are given, and the mask, checked, contiguous, and but for the mask of one dtype."""
    first = given["logprobs"]
    check.floating("ppo_loss", "logprobs", first)
    critic = any(given[name] is not None for name in ("vpreds", "values", "returns"))
    for name in _FLOATS[1:]:
        x = given[name]
        if x is None and (name in _OPTIONAL or (not critic and name in ("vpreds", "values", "returns"))):
            continue
        check.floating("ppo_loss", name, x)
        check.shape("ppo_loss", name, x, first.shape, "logprobs")
        check.device("ppo_loss", name, x, first.device, "logprobs")
    mask = check.mask("ppo_loss", given["mask"], first.shape, first.device, "logprobs")
    found = {name: given[name] for name in _FLOATS if given[name] is not None}
    found = {name: x.contiguous() for name, x in zip(found, check.same_dtype(*found.values()))}
    return found | {"mask": mask.contiguous()}


def run(**given: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`ppo_loss`, whose arguments these are, by name."""
    found = _ppo_options.choices(**{name: given[name] for name in _ppo_options.CHOICES})
    tensors = _prepare(given)
    first = tensors["logprobs"]
    number, tensor = _ppo_options.denominator(given["denominator"], first, tensors["mask"])
    counts = _ppo_options.row_counts(given["row_counts"], first)
    values = _ppo_options.numbers(**{name: given[name] for name in _ppo_options.NUMBERS} | {"denominator": number})
    _ppo_options.combination(found, given, values)
    for name in _DIFFERENTIABLE:
        if name in tensors:
            check.no_tangent("ppo_loss", name, tensors[name])
    denominator = tensor if number == 0 else number
    return reference.ppo_loss(**given | tensors | {"denominator": denominator, "row_counts": counts})
