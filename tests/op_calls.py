"""Every public op by name: the roles of its arguments, valid inputs, and one way to run it with its gradients."""

import torch
from cases import logits_inputs, token_inputs

import ppo_ext

# The role of an argument says what it may be, and so what it must not be.
LOGITS, REF_LOGITS, LABELS, MASK, WEIGHTS, TOKENS, SCORES = range(7)
TENSORS = (LOGITS, REF_LOGITS, LABELS, MASK, WEIGHTS, TOKENS, SCORES)
TEMPERATURE, FINITE, NOT_NEGATIVE, THRESHOLD, FLAG, AXIS, PENALTY = range(7, 14)

_ON_LOGITS = {"temperature": TEMPERATURE, "mask": MASK, "inplace_backward": FLAG}
ROLES = {
    "logprobs": {"logits": LOGITS, "labels": LABELS, **_ON_LOGITS, "validate": FLAG},
    "logprobs_and_entropy": {"logits": LOGITS, "labels": LABELS, **_ON_LOGITS, "validate": FLAG},
    "full_kl": {"logits": LOGITS, "ref_logits": REF_LOGITS, **_ON_LOGITS},
    "kl_rewards": {
        "scores": SCORES,
        "logprobs": TOKENS,
        "ref_logprobs": TOKENS,
        "mask": MASK,
        "kl_coef": FINITE,
        "kl_penalty": PENALTY,
        "kls": TOKENS,
    },
    "gae": {"values": TOKENS, "rewards": TOKENS, "mask": MASK, "gamma": FINITE, "lam": FINITE},
    "masked_mean": {"values": TOKENS, "mask": WEIGHTS, "axis": AXIS},
    "masked_var": {"values": TOKENS, "mask": WEIGHTS, "unbiased": FLAG},
    "masked_whiten": {"values": TOKENS, "mask": WEIGHTS, "shift_mean": FLAG},
    "ppo_loss": {
        "logprobs": TOKENS,
        "old_logprobs": TOKENS,
        "advantages": TOKENS,
        "vpreds": TOKENS,
        "values": TOKENS,
        "returns": TOKENS,
        "mask": MASK,
        "cliprange": NOT_NEGATIVE,
        "cliprange_value": NOT_NEGATIVE,
        "vf_coef": FINITE,
        "ratio_threshold": THRESHOLD,
    },
}
OPS = tuple(ROLES)
_OUTPUTS = {
    "logprobs_and_entropy": ("logprobs", "entropy"),
    "kl_rewards": ("rewards", "non_score_rewards", "kls"),
    "gae": ("advantages", "returns"),
    "ppo_loss": ("loss", "stats"),
}
DIFFERENTIABLE = {
    "logprobs": ("logits",),
    "logprobs_and_entropy": ("logits",),
    "full_kl": ("logits",),
    "gae": (),
    "kl_rewards": (),
    "masked_mean": ("values",),
    "masked_var": ("values",),
    "masked_whiten": ("values",),
    "ppo_loss": ("logprobs", "vpreds"),
}


def valid_arguments(op, shape=(2, 3), vocabulary=7, device="cpu", dtype=torch.float32):
    """Tensors that `op` accepts, by name, for [B, T] tokens; every second token or so counts."""
    inputs = token_inputs(shape, device, dtype) | logits_inputs((*shape, vocabulary), dtype, device)
    arguments = {name: inputs[name] for name, role in ROLES[op].items() if role in TENSORS and name in inputs}
    return arguments | ({"kl_coef": 0.2} if op == "kl_rewards" else {})


def run(op, arguments, grads=None, module=ppo_ext):
    """The results of `op` by name, and the gradient of each differentiable input as grad_<name>.

    `grads` holds the incoming gradients by the names of the results; where it has none, they are all different.
    """
    arguments = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    leaves = {name: arguments[name].requires_grad_() for name in DIFFERENTIABLE[op]}
    # Not the leaves themselves: with inplace_backward the gradient goes where the input was.
    outputs = getattr(module, op)(**arguments | {name: leaf.view_as(leaf) for name, leaf in leaves.items()})
    outputs = dict(zip(_OUTPUTS.get(op, (op,)), outputs if isinstance(outputs, tuple) else (outputs,)))
    incoming = {
        name: (grads or {}).get(name, torch.linspace(0.5, 2.0, x.numel(), device=x.device).view(x.shape))
        for name, x in outputs.items()
        if name != "stats"
    }
    outputs |= outputs.pop("stats", {})
    results = {name: x.detach() for name, x in outputs.items()}
    if leaves:
        loss = sum((outputs[name] * grad.to(outputs[name].dtype)).sum() for name, grad in incoming.items())
        results |= {f"grad_{name}": grad for name, grad in zip(leaves, torch.autograd.grad(loss, leaves.values()))}
    return results
