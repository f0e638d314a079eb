"""The optimizers that the trainers make when they are given none."""

import torch

_FUSED_DEVICES = ("cpu", "cuda")


def make(optimizer: type[torch.optim.Adam], parameters, device: torch.device, **options) -> torch.optim.Optimizer:
    """Adam or AdamW over those parameters that need a gradient, in torch's fused kernel where `device` has one.

    It reads gradients, moments and weights once and makes no copies of them; the arithmetic differs by rounding only.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return optimizer(trained, fused=True if device.type in _FUSED_DEVICES else None, **options)
