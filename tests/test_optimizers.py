"""The optimizers that a trainer makes: torch's update rule, over the parameters that require a gradient."""

import pytest
import tiny_models
import torch

from ppo_ext.trainer import optimizers

OPTIMIZERS = {"Adam": {"lr": 1e-2}, "AdamW": {"lr": 1e-2, "weight_decay": 0.3, "betas": (0.9, 0.95)}}


def updated(weight, gradients, make):
    weight = weight.clone().requires_grad_()
    optimizer = make([weight])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_torch_in_float64(name):
    kind, options = getattr(torch.optim, name), OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = torch.randn(6, 1237, generator=generator)
    ours = updated(weight, gradients, lambda p: optimizers.make(kind, p, torch.device("cpu"), **options))
    right = updated(weight.double(), [g.double() for g in gradients], lambda p: kind(p, **options))
    torch.testing.assert_close(ours.double(), right, rtol=1e-6, atol=1e-7)


def test_frozen_weights_of_any_dtype_are_left_out():
    quantized = torch.nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    trained = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizers.make(torch.optim.AdamW, [quantized, trained], torch.device("cpu"))
    (only,) = optimizer.param_groups[0]["params"]
    assert only is trained


@pytest.mark.parametrize("kind, fused", [("cpu", True), ("cuda", True), ("xla", None)])
def test_fused_where_torch_has_the_kernel(kind, fused):
    optimizer = optimizers.make(torch.optim.Adam, [torch.nn.Parameter(torch.ones(3))], torch.device(kind))
    assert optimizer.param_groups[0]["fused"] is fused


def test_a_trainer_without_an_optimizer_makes_a_fused_adam():
    trainer = tiny_models.trainer(learning_rate=3e-4)
    (group,) = trainer.optimizer.param_groups
    assert isinstance(trainer.optimizer.optimizer, torch.optim.Adam)
    assert (group["lr"], group["fused"]) == (3e-4, True)
