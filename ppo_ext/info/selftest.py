"""A second's worth of checking: every compiled op against the reference, on one device."""

import torch

import ppo_ext

from ..ops import reference

_LIMIT = 1e-4  # float32 against float32 with another order of summation; a wrong kernel is off by far more


def run(devices):
    """{device: {"passed", "limit", "errors": {op: largest error}, "raised": {op: message}}}."""
    return {device: _run_on(device) for device in devices}


def _run_on(device):
    errors, raised = {}, {}
    for name, case in _CASES.items():
        try:
            x = _inputs(device)
            errors[name] = _largest_error(case(ppo_ext, x), case(reference, x))
        except Exception as error:  # whatever it is, the report must reach the reader
            raised[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    passed = not raised and all(error <= _LIMIT for error in errors.values())
    return {"passed": passed, "limit": _LIMIT, "errors": errors, "raised": raised}


def _inputs(device):
    generator = torch.Generator().manual_seed(0)
    B, T, V = 4, 9, 1003

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    return {
        "logits": normal(B, T, V),
        "ref_logits": normal(B, T, V),
        "labels": torch.randint(V, (B, T), generator=generator).to(device),
        "mask": (torch.arange(T) < torch.tensor([[9], [7], [1], [0]])).to(device),
        "scores": normal(B),
        "logprobs": -normal(B, T).abs(),
        "ref_logprobs": -normal(B, T).abs(),
        "values": normal(B, T),
        "rewards": normal(B, T),
        "advantages": normal(B, T),
        "vpreds": normal(B, T),
        "returns": normal(B, T),
    }


def _largest_error(ours, expected):
    """Over outputs and gradients, relative where the reference is above 1."""
    worst = 0.0
    for a, b in zip(ours, expected, strict=True):
        if not torch.isfinite(a).all():
            raise ArithmeticError("the result is not finite")
        worst = max(worst, ((a - b).abs() / b.abs().clamp(min=1)).max().item())
    return worst


def _with_grad(f, *inputs):
    """The outputs of `f` and the gradients of their sum."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = f(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(sum(y.sum() for y in outputs), leaves)]


def _ppo_loss(ops, x):
    return _with_grad(
        lambda logprobs, vpreds: ops.ppo_loss(
            logprobs, x["ref_logprobs"], x["advantages"], vpreds, x["values"], x["returns"], x["mask"]
        )[0],
        x["logprobs"],
        x["vpreds"],
    )


_CASES = {
    "logprobs": lambda ops, x: _with_grad(lambda z: ops.logprobs(z, x["labels"], mask=x["mask"]), x["logits"]),
    "logprobs_and_entropy": lambda ops, x: _with_grad(
        lambda z: ops.logprobs_and_entropy(z, x["labels"], temperature=0.7), x["logits"]
    ),
    "full_kl": lambda ops, x: _with_grad(lambda z: ops.full_kl(z, x["ref_logits"], mask=x["mask"]), x["logits"]),
    "kl_rewards": lambda ops, x: ops.kl_rewards(x["scores"], x["logprobs"], x["ref_logprobs"], x["mask"], kl_coef=0.2),
    "gae": lambda ops, x: ops.gae(x["values"], x["rewards"], x["mask"], gamma=0.99),
    "masked_mean": lambda ops, x: [ops.masked_mean(x["values"], x["mask"])],
    "masked_var": lambda ops, x: [ops.masked_var(x["values"], x["mask"])],
    "masked_whiten": lambda ops, x: _with_grad(lambda v: ops.masked_whiten(v, x["mask"]), x["values"]),
    "ppo_loss": _ppo_loss,
}
