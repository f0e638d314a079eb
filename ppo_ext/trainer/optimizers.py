"""The optimizer that a trainer makes when it is given none."""

from collections.abc import Iterable
from typing import Any

import torch

_FUSED_DEVICES = ("cpu", "cuda")


def make(
    optimizer: type[torch.optim.Adam], parameters: Iterable[torch.nn.Parameter], device: torch.device, **options: Any
) -> torch.optim.Optimizer:
    """Adam or AdamW over the parameters that require a gradient, with torch's fused kernel where `device` has one.

    The fused kernel reads gradients, moments and weights once and makes no copies of them; its results differ by
    rounding only.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return optimizer(trained, fused=True if device.type in _FUSED_DEVICES else None, **options)
