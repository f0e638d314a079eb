"""Training mode and evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode within the block; afterwards, also after an error, each module in the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def recompute_layers_without_dropout(model: nn.Module) -> None:
    """Makes gradient checkpointing work in eval mode, where transformers does not recompute.

    transformers recomputes only layers in training mode. So the layers are put into that mode and the modules inside
    them, such as nn.Dropout, are not. A layer with a dropout of its own, applied as a function, has to stay in eval mode
    and keeps its activations.
    """
    for module in model.modules():
        drops = any("dropout" in name and isinstance(p, float) and p > 0 for name, p in vars(module).items())
        module.training = getattr(module, "gradient_checkpointing", False) and not drops
