"""The frozen reference of a policy, with its first layers shared if asked for."""

import copy
from typing import TypeVar

from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

# TRL 0.11.4, `LAYER_PATTERNS`, and T5. Encoder parameters come before the decoder's, so they are all shared, as in BART
LAYER_PATTERNS = (
    "transformer.h.{layer}",
    "model.decoder.layers.{layer}",
    "gpt_neox.layers.{layer}",
    "model.layers.{layer}",
    "decoder.block.{layer}",
)

Model = TypeVar("Model", bound=nn.Module)


def create_reference_model(model: Model, num_shared_layers: int | None = None, pattern: str | None = None) -> Model:
    """Returns a copy of the model in eval mode without gradients.

    Args:
        num_shared_layers: all parameters before layer number `num_shared_layers` (the embeddings and the layers 0 to
            num_shared_layers - 1) are frozen in `model` and are the same tensors in the copy. None copies everything
            and freezes nothing in `model`.
        pattern: the layers' name, such as "transformer.h.{layer}"; by default the first of `LAYER_PATTERNS` that
            matches, or else the last list of layers that is as long as the config says.

    Raises: ValueError if no name matches, and under DeepSpeed ZeRO-3, where no rank has whole parameters to copy.

    Source: TRL 0.11.4, `create_reference_model`; there the shared layers are frozen copies.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "create_reference_model: the model must hold whole parameters, got DeepSpeed ZeRO-3; load the reference "
            "with from_pretrained instead"
        )
    shared = [] if num_shared_layers is None else _parameters_before(model, num_shared_layers, pattern)
    # deepcopy does not copy what its memo already holds: the shared parameters stay the model's own, so the loop below
    # freezes them in the model as well
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    return reference.eval()


def _parameters_before(model: nn.Module, num_shared_layers: int, pattern: str | None) -> list[nn.Parameter]:
    """The parameters before a layer, in the order of `named_parameters`."""
    names = [name for name, _ in model.named_parameters()]
    candidates = (*LAYER_PATTERNS, *_layer_lists(model)) if pattern is None else (pattern,)
    for candidate in candidates:
        layer = candidate.format(layer=num_shared_layers)
        for position, name in enumerate(names):
            if f".{layer}." in f".{name}.":
                return [parameter for _, parameter in list(model.named_parameters())[:position]]
    raise ValueError(
        f"create_reference_model: num_shared_layers must name a layer of the model by one of {', '.join(candidates)}, "
        f"got {num_shared_layers}; pattern takes another name"
    )


def _layer_lists(model: nn.Module) -> list[str]:
    """Patterns of the lists of layers in a transformers model, those that are as long as the config says first.

    Lists of one length side by side are left out: XLM keeps attentions and norms apart, so that none of them is its layers.
    """
    config = getattr(model, "config", None)
    text_config = config.get_text_config(decoder=True) if config is not None else None
    depth = getattr(text_config, "num_hidden_layers", None)
    lists = [(name, len(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, length) for name, length in lists if not any(part.isdigit() for part in name.split("."))]
    places = [(name.rpartition(".")[0], length) for name, length in lists]
    whole = [found for found, place in zip(lists, places) if places.count(place) == 1]
    whole.sort(key=lambda found: found[1] == depth)  # stable: among equals the last, the decoder's, stays last
    return [f"{name}.{{layer}}" for name, _ in reversed(whole)]
