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


def trained(dtype=torch.float32):
    return [torch.nn.Parameter(torch.ones(3, 2, dtype=dtype))]


def schedule(kind, **options):
    return lambda optimizer: getattr(torch.optim.lr_scheduler, kind)(optimizer, **options)


IMPOSSIBLE = {
    "closure": (torch.optim.LBFGS, None, "step without a closure, got LBFGS, which needs one"),
    "sparse": (torch.optim.SparseAdam, None, "step on torch.float32 weights, got SparseAdam: .* dense gradients"),
    "differentiable": (
        lambda p: torch.optim.Adam(p, differentiable=True),
        None,
        "step on torch.float32 weights, got Adam",
    ),
    "ascent": (lambda p: torch.optim.SGD(p, maximize=True), None, "minimise the loss, got SGD with maximize=True"),
    "others": (lambda p: torch.optim.Adam(trained()), None, "hold weights of the model .*, got Adam of 1 others"),
    "metric": (torch.optim.Adam, schedule("ReduceLROnPlateau"), "step without a metric, got ReduceLROnPlateau"),
    "other optimizer": (
        torch.optim.Adam,
        lambda optimizer: schedule("LinearLR")(torch.optim.Adam(trained())),
        "be made of the optimizer that the trainer gets, got one of another",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_work_is_refused(case):
    make, make_schedule, text = IMPOSSIBLE[case]
    parameters = trained()
    optimizer = make(parameters)
    lr_scheduler = make_schedule and make_schedule(optimizer)
    argument = "lr_scheduler" if lr_scheduler else "optimizer"
    with pytest.raises(ValueError, match=f"PPOTrainer: {argument} must {text}"):
        optimizers.check(optimizer, lr_scheduler, parameters)


@pytest.mark.parametrize("got", [torch.optim.Adam, "adam"])
def test_what_is_no_optimizer_is_refused(got):
    with pytest.raises(TypeError, match="PPOTrainer: optimizer must be a torch optimizer, .* got (Adam|str)"):
        optimizers.check(got, None, trained())


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad"])
def test_an_epsilon_that_is_0_in_float16_is_refused(kind):
    make, parameters = getattr(torch.optim, kind), trained(torch.float16)
    with pytest.raises(
        ValueError,
        match=rf"must keep torch.float16 weights finite, got {kind} with eps=1e-\d+, lr=.*; take a larger eps",
    ):
        optimizers.check(make(parameters), None, parameters)
    optimizers.check(make(parameters, eps=1e-4), None, parameters)
    assert not torch.optim.Adam(parameters).state and (parameters[0] == 1).all() and parameters[0].grad is None


SCHEDULES = {
    "LinearLR": {},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 9},
    "MultiStepLR": {"milestones": [3]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["SGD", "Adadelta", "ASGD", "Rprop"])
def test_what_can_work_is_accepted_and_left_as_it_is(kind, dtype):
    parameters = trained(dtype)
    optimizer = getattr(torch.optim, kind)(parameters)
    optimizers.check(optimizer, None, parameters)
    assert not optimizer.state and (parameters[0] == 1).all() and parameters[0].grad is None


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_without_a_metric_are_accepted(kind):
    parameters = trained()
    optimizer = torch.optim.SGD(parameters, lr=1.0, momentum=0.9)
    lr_scheduler = schedule(kind, **SCHEDULES[kind])(optimizer)
    rates, last_epoch = lr_scheduler.get_last_lr(), lr_scheduler.last_epoch
    optimizers.check(optimizer, lr_scheduler, parameters)
    assert (rates, last_epoch) == (lr_scheduler.get_last_lr(), lr_scheduler.last_epoch)


def test_a_trainer_checks_its_optimizer():
    with pytest.raises(ValueError, match="optimizer must step without a closure"):
        tiny_models.trainer(optimizer=torch.optim.LBFGS)
