"""logprobs and logprobs_and_entropy, forward and forward + backward. Floor: the logits once per pass.

A forward reads N*V*s bytes (s = size of a logit). A backward reads them again and writes the gradient, N*V*s bytes, to
fresh memory or over the logits.
"""

import torch

import ppo_ext
from ppo_ext import reference

from . import cases, trl_baseline
from .suite import OURS, OURS_IN_PLACE, Case, Implementation, in_float64
from .timing import Traffic

_ROWS_AT_ONCE = 128  # the float64 reference of all rows at once would need many times the memory of the logits


def forward(inputs, op, **options):
    """op's outputs as a tuple."""
    outputs = op(inputs["logits"], inputs["labels"], **options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def forward_backward(inputs, op, **options):
    """The gradient of the logits for the incoming gradients in `inputs`."""
    logits = inputs["logits"].detach().requires_grad_()
    outputs = forward({**inputs, "logits": logits}, op, **options)
    incoming = [inputs[name].to(x.dtype) for name, x in zip(("grad_logprobs", "grad_entropy"), outputs)]
    return torch.autograd.grad(outputs, logits, incoming)


def by_rows(run, inputs):
    """`run` on float64 copies of the inputs, some rows at a time."""
    pieces = []
    for start in range(0, inputs["labels"].shape[0], _ROWS_AT_ONCE):
        pieces.append(run(in_float64({name: x[start:start + _ROWS_AT_ONCE] for name, x in inputs.items()})))
    return tuple(torch.cat(parts) for parts in zip(*pieces))


def _gather_minus_logsumexp(logits, labels):
    """The leanest expression in plain torch for fp32; what TRL moved to in 0.15, without its loop over rows."""
    return logits.gather(-1, labels[:, None]).squeeze(-1) - torch.logsumexp(logits, -1)


def _trl_logprobs(trl):
    return lambda logits, labels: trl.logprobs_from_logits(logits[None], labels[None])[0]  # TRL takes [B, T, V]


def _trl_logprobs_and_entropy(trl):
    logprobs = _trl_logprobs(trl)
    return lambda logits, labels: (logprobs(logits, labels), trl.entropy_from_logits(logits))


def _case(name, shape, dtype, pass_name, *, upcast):
    run = forward if pass_name == "forward" else forward_backward
    ours, exact = getattr(ppo_ext, name), getattr(reference, name)
    size = shape[0] * shape[1] * dtype.itemsize
    implementations = {OURS: Implementation(lambda inputs: run(inputs, ours))}
    if run is forward_backward:
        implementations[OURS_IN_PLACE] = Implementation(
            lambda inputs: run(inputs, ours, inplace_backward=True), destroys_logits=True,
            traffic=Traffic(read=size, update=size))
    if name == "logprobs":
        implementations["torch gather - logsumexp"] = Implementation(
            lambda inputs: run(inputs, _gather_minus_logsumexp))
    trl_op = _trl_logprobs if name == "logprobs" else _trl_logprobs_and_entropy
    return Case(
        name, pass_name, shape, dtype,
        make=lambda device: cases.logits_inputs(shape, dtype, device),
        reference=lambda inputs: by_rows(lambda rows: run(rows, exact), inputs),
        implementations=implementations | trl_baseline.baselines(run, trl_op, upcast=upcast),
        traffic=Traffic(read=size) if run is forward else Traffic(read=size, copy=size))


def suite(device, full):
    for shape in cases.logits_shapes(device, full):
        for dtype in cases.LOGIT_DTYPES:
            low_precision = dtype != torch.float32
            yield _case("logprobs", shape, dtype, "forward", upcast=low_precision)
            yield _case("logprobs_and_entropy", shape, dtype, "forward", upcast=low_precision)
            yield _case("logprobs", shape, dtype, "forward+backward", upcast=low_precision and full)
            if full:
                yield _case("logprobs_and_entropy", shape, dtype, "forward+backward", upcast=low_precision)
