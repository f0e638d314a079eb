"""full_kl, forward and forward + backward. Floor: both logits once per pass, and the gradient of the policy's.

The forward reads 2*N*V*s bytes (s = size of a logit); the backward reads them again and writes N*V*s.
"""

import torch

import ppo_ext
from ppo_ext import reference

from . import cases, trl_baseline
from .bench_logprobs import by_rows
from .suite import OURS, OURS_IN_PLACE, Case, Implementation
from .timing import Traffic


def forward(inputs, op, **options):
    return (op(inputs["logits"], inputs["ref_logits"], **options),)


def forward_backward(inputs, op, **options):
    """The gradient of the policy's logits for an incoming gradient."""
    logits = inputs["logits"].detach().requires_grad_()
    kls = op(logits, inputs["ref_logits"], **options)
    return torch.autograd.grad(kls, logits, inputs["grad_logprobs"].to(kls.dtype))


def _trl_full_kl(trl):
    """What TRL's trainer computes for kl_penalty="full": two log-softmaxes, then `_kl_penalty`."""
    def full_kl(logits, ref_logits):
        log_p, log_q = (trl.logprobs_from_logits(x[None], None, gather=False)[0] for x in (logits, ref_logits))
        return trl.kl_penalty(log_p, log_q)
    return full_kl


def _case(shape, dtype, pass_name):
    run = forward if pass_name == "forward" else forward_backward
    size = shape[0] * shape[1] * dtype.itemsize
    implementations = {OURS: Implementation(lambda inputs: run(inputs, ppo_ext.full_kl))}
    if run is forward_backward:
        implementations[OURS_IN_PLACE] = Implementation(
            lambda inputs: run(inputs, ppo_ext.full_kl, inplace_backward=True), destroys_logits=True,
            traffic=Traffic(read=3 * size, update=size))
    return Case(
        "full_kl", pass_name, shape, dtype,
        make=lambda device: cases.logits_inputs(shape, dtype, device),
        reference=lambda inputs: by_rows(lambda rows: run(rows, reference.full_kl), inputs),
        implementations=implementations | trl_baseline.baselines(run, _trl_full_kl, upcast=dtype != torch.float32),
        traffic=Traffic(read=2 * size) if run is forward else Traffic(read=3 * size, copy=size))


def suite(device, full):
    for shape in cases.logits_shapes(device, full):
        for dtype in cases.LOGIT_DTYPES if full else (torch.float32,):
            yield _case(shape, dtype, "forward")
            if full:
                yield _case(shape, dtype, "forward+backward")
