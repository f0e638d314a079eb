"""ppo_loss with all its statistics, forward and backward. Floor: 6 arrays and the mask in, 4 arrays out.

Reads 24 bytes per token and the int64 mask; writes the gradients of logprobs and vpreds and the two per-token
statistics, 16. TRL's loss also takes the entropy of the logits; that is timed with logprobs_and_entropy and left out
here. Checked: both gradients, the loss, and the statistics that both sides give.
"""

import torch

import ppo_ext
from ppo_ext import reference

from . import cases, trl_baseline
from .suite import OURS, Case, Implementation, in_float64
from .timing import Traffic

_PER_TOKEN = ("logprobs", "old_logprobs", "advantages", "vpreds", "values", "returns", "mask")
_STATS = ("loss/policy", "loss/value", "policy/approxkl", "policy/policykl", "policy/clipfrac",
          "policy/advantages_mean", "returns/mean", "returns/var", "val/vpred", "val/error", "val/clipfrac", "val/mean",
          "val/var")


def run(inputs, op):
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("logprobs", "vpreds")}
    loss, stats = op(**{name: leaves.get(name, inputs[name]) for name in _PER_TOKEN})
    gradients = torch.autograd.grad(loss, tuple(leaves.values()))
    return [*gradients, loss.detach(), *(stats[name] for name in _STATS)]


def _trl_loss(trl):
    def loss(logprobs, old_logprobs, advantages, vpreds, values, returns, mask):
        pg_loss, vf_loss, stats = trl.loss_without_entropy(old_logprobs, values, logprobs, vpreds, logprobs, mask,
                                                           advantages, returns)
        return pg_loss + vf_loss, stats
    return loss


def suite(device, full):
    for shape in cases.token_shapes("ppo_loss", full):
        tokens = shape[0] * shape[1]
        yield Case(
            "ppo_loss", "forward+backward", shape, torch.float32,
            make=lambda device, shape=shape: cases.token_inputs(shape, device),
            reference=lambda inputs: run(in_float64(inputs), reference.ppo_loss),
            implementations={OURS: Implementation(lambda inputs: run(inputs, ppo_ext.ppo_loss)),
                             **trl_baseline.baselines(run, _trl_loss)},
            traffic=Traffic(read=16 * tokens, copy=16 * tokens))
