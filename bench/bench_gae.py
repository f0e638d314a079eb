"""gae alone, and gae followed by whitening, as in TRL's `compute_advantages`. Floor: 4 arrays and the mask.

Reads values and rewards, 8 bytes per token, and the int64 mask; writes advantages and returns, 8 bytes per token.
Advantages are compared where the mask counts: elsewhere TRL lets the recursion run on, and we give 0.
"""

import torch

import ppo_ext
from ppo_ext import reference

from . import cases, trl_baseline
from .suite import OURS, Case, Implementation, compiled, in_float64
from .timing import Traffic

GAMMA, LAM = 1.0, 0.95


def run(inputs, op):
    return op(inputs["values"], inputs["rewards"], inputs["mask"])


def masked_in(inputs, outputs):
    return [torch.where(inputs["mask"] != 0, x, 0.0) for x in outputs]


def _with_whitening(library):
    def gae_and_whiten(values, rewards, mask):
        advantages, returns = library.gae(values, rewards, mask, gamma=GAMMA, lam=LAM)
        return library.masked_whiten(advantages, mask), returns
    return gae_and_whiten


def _loop(values, rewards, mask):
    """The loop of TRL 0.11.4, `compute_advantages`, without its whitening."""
    last_advantage, advantages_reversed = 0, []
    values, rewards = values * mask, rewards * mask
    tokens = rewards.shape[-1]
    for t in reversed(range(tokens)):
        next_values = values[:, t + 1] if t < tokens - 1 else 0.0
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        last_advantage = delta + GAMMA * LAM * last_advantage
        advantages_reversed.append(last_advantage)
    advantages = torch.stack(advantages_reversed[::-1]).transpose(0, 1)
    return advantages, advantages + values


def _product(values, rewards, mask):
    """The strongest form in plain torch: deltas times the triangular matrix of (gamma*lam)^(k - t)."""
    values, rewards = values * mask, rewards * mask
    delta = rewards + GAMMA * torch.nn.functional.pad(values, (0, 1))[:, 1:] - values
    position = torch.arange(values.shape[1], device=values.device)
    steps = (position[:, None] - position[None, :]).to(values.dtype)
    weights = torch.where(steps >= 0, (GAMMA * LAM) ** steps.clamp(min=0), 0.0)
    advantages = delta @ weights
    return advantages, advantages + values


def _case(name, shape, implementations, exact):
    tokens = shape[0] * shape[1]
    return Case(
        name, "forward", shape, torch.float32,
        make=lambda device: cases.token_inputs(shape, device),
        reference=lambda inputs: run(in_float64(inputs), exact),
        implementations=implementations, select=masked_in, traffic=Traffic(read=8 * tokens, copy=8 * tokens))


def suite(device, full):
    ops = {OURS: lambda *inputs: ppo_ext.gae(*inputs, gamma=GAMMA, lam=LAM), "TRL's loop": _loop,
           "torch, one matrix product": _product, "torch, one matrix product, compiled": compiled(_product)}
    both = _with_whitening(ppo_ext)
    for shape in cases.token_shapes("gae", full):
        yield _case("gae", shape,
                    {name: Implementation(lambda inputs, op=op: run(inputs, op)) for name, op in ops.items()},
                    lambda *inputs: reference.gae(*inputs, gamma=GAMMA, lam=LAM))
        trl = trl_baseline.baselines(run, lambda trl: lambda values, rewards, mask: trl.compute_advantages(
            values, rewards, mask)[1:])
        trl[trl_baseline.COMPILED] = "torch.compile unrolls the loop over tokens; compiling takes minutes"
        yield _case("gae+masked_whiten", shape, {OURS: Implementation(lambda inputs: run(inputs, both)), **trl},
                    _with_whitening(reference))
