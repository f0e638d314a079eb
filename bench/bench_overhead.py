"""The cost of a call before there is anything to compute: inputs of a few tokens, microseconds on the host.

Ours is called as a user calls it. Beside it are the torch operators below it: the same kernels, forward and backward,
called through torch's dispatcher without the checks and without autograd, on inputs that need no conversion. Each
`bench_<stem>.py` has the cases (`tiny_cases`) and the operators (`OPERATORS`).
"""

import dataclasses
import importlib

import torch

from tests.ops import STEMS

from .passes import BOTH, FORWARD
from .suite import Implementation, backend

OPERATOR = "torch operator"
# microseconds that a call may take: goals of this project, which tables show beside the measured time
TARGET_US = {("ppo_loss", FORWARD): 25.0, ("kl_rewards", FORWARD): 25.0, ("ppo_loss", BOTH): 60.0}


def _prepare(inputs):
    """The inputs in the form that the operators take."""
    tensors = {name: x.contiguous() for name, x in inputs.items()}
    return {
        **tensors,
        "mask": inputs["mask"].bool(),
        "weights": inputs["mask"].float(),
        "one": torch.ones((), device=inputs["mask"].device),
    }


def _as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def _implementation(operators, pass_name):
    """The operators of an op as an implementation of a pass."""

    def run(inputs):
        outputs = _as_tuple(operators.forward(inputs))
        gradients = () if pass_name == FORWARD else _as_tuple(operators.backward(inputs, outputs))
        return *gradients, *outputs[: operators.results]

    return Implementation(run, prepare=_prepare, partial=True)


def suite(device, full):
    missing = "the compiled operators are not loaded; see `python -m ppo_ext info`"
    for stem in STEMS:
        module = importlib.import_module(f".bench_{stem}", __package__)
        for case in module.tiny_cases(device):
            operators = module.OPERATORS[case.op]
            operator = _implementation(operators, case.pass_name) if backend(device) == "native" else missing
            ours, *others = case.implementations.items()
            yield dataclasses.replace(
                case, implementations=dict([ours, (OPERATOR, operator), *others]), traffic=None, capturable=False
            )
