"""What a call costs before there is anything to compute: inputs of a few tokens, microseconds on the host.

Ours is called as a user does. The raw operators are what remains of it without its checks and without autograd: the same
kernels, forward and backward, through torch's dispatcher alone, on inputs that are already as the kernels want them.
"""

import dataclasses

import torch

from . import bench_full_kl, bench_gae, bench_kl_rewards, bench_logprobs, bench_masked, bench_ppo_loss, cases
from .passes import BOTH, FORWARD
from .suite import Implementation, backend
from .trl_baseline import KL_COEF

OPERATOR = "torch operator"
# microseconds that a call may take: the project's own goals, printed beside what was measured
TARGET_US = {("ppo_loss", FORWARD): 25.0, ("kl_rewards", FORWARD): 25.0, ("ppo_loss", BOTH): 60.0}
_SCORED = ("scores", "logprobs", "ref_logprobs", "mask")
_PER_TOKEN = ("logprobs", "old_logprobs", "advantages", "vpreds", "values", "returns", "mask")


def _ops():
    return torch.ops.ppo_ext


def _logprobs_gradient(inputs, out, grad_entropy):
    return _ops()._logprobs_backward.default(
        inputs["logits"], inputs["grad_logprobs"], grad_entropy, inputs["labels"], None, *out[1:], 1.0
    )


# op: (its operator, how many of its outputs are results, its backward operator on the same inputs and those outputs)
_OPERATORS = {
    "gae": (lambda x: _ops()._gae.default(x["values"], x["rewards"], x["mask"], cases.GAMMA, cases.LAM), 2, None),
    "kl_rewards": (lambda x: _ops()._kl_rewards.default(*(x[name] for name in _SCORED), KL_COEF, 0), 3, None),
    "masked_whiten": (
        lambda x: _ops()._masked_whiten.default(x["advantages"], x["weights"], True),
        1,
        lambda x, out: _ops()._masked_whiten_backward.default(
            x["incoming"], x["advantages"], x["weights"], out[1], True
        ),
    ),
    "logprobs": (
        lambda x: _ops()._logprobs.default(x["logits"], x["labels"], None, 1.0, False, None),
        1,
        lambda x, out: _logprobs_gradient(x, out, None),
    ),
    "logprobs_and_entropy": (
        lambda x: _ops()._logprobs.default(x["logits"], x["labels"], None, 1.0, True, None),
        2,
        lambda x, out: _logprobs_gradient(x, out, x["grad_entropy"]),
    ),
    "full_kl": (
        lambda x: _ops()._full_kl.default(x["logits"], x["ref_logits"], None, 1.0),
        1,
        lambda x, out: _ops()._full_kl_backward.default(
            x["logits"], x["ref_logits"], x["grad_logprobs"], None, *out, 1.0
        ),
    ),
    "ppo_loss": (
        lambda x: _ops()._ppo_loss.default(*(x[name] for name in _PER_TOKEN), 0.2, 0.2, 0.1, float("inf")),
        1,
        lambda x, out: _ops()._ppo_loss_backward.default(x["one"], out[1], *out[4:]),
    ),
}


def _operator(op, pass_name):
    """The operators of `op` as an implementation of a pass."""
    forward, results, backward = _OPERATORS[op]

    def run(inputs):
        outputs = forward(inputs)
        if pass_name == FORWARD:
            return outputs[:results]
        gradients = backward(inputs, outputs)
        return *(gradients if isinstance(gradients, tuple) else (gradients,)), *outputs[:results]

    def prepare(inputs):
        tensors = {name: x.contiguous() for name, x in inputs.items()}
        return {
            **tensors,
            "mask": inputs["mask"].bool(),
            "weights": inputs["mask"].float(),
            "one": torch.ones((), device=inputs["mask"].device),
        }

    return Implementation(run, prepare=prepare, partial=True)


def _tiny_cases(device):
    options = {"kind": "overhead", "with_compiled": False}
    for pass_name in (FORWARD, BOTH):
        yield bench_ppo_loss.case(cases.TINY_TOKENS, pass_name, device, **options)
        yield bench_masked.case(cases.TINY_TOKENS, pass_name, device, **options)
        for name in bench_logprobs.OPS:
            yield bench_logprobs.case(name, cases.TINY_LOGITS, torch.float32, pass_name, device, **options)
        yield bench_full_kl.case(cases.TINY_LOGITS, torch.float32, pass_name, device, **options)
    yield bench_kl_rewards.case(cases.TINY_TOKENS, device, **options)
    yield bench_gae.case("gae", cases.TINY_TOKENS, device, **options)


def suite(device, full):
    for case in _tiny_cases(device):
        operator = (
            _operator(case.op, case.pass_name)
            if backend(device) == "native"
            else "the compiled operators are not loaded; see `python -m ppo_ext info`"
        )
        ours, others = list(case.implementations.items())[0], list(case.implementations.items())[1:]
        yield dataclasses.replace(
            case, implementations=dict([ours, (OPERATOR, operator), *others]), traffic=None, capturable=False
        )
