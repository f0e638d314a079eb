"""The loss head of a training minibatch: from the model's logits [B, T, V] to the gradients of logits and vpreds.

It is logprobs, their entropy as a statistic, the loss with all its statistics, and the backward pass. Timed, and its
peak memory above the logits taken, in logits-sized buffers: a gradient of its own is one such buffer, a gradient
written over the logits none. TRL's head is its own: `logprobs_from_logits` and `PPOTrainer.loss` on logits[:, :-1].
Floor: the logits read twice and the gradient written.
"""

import torch

import ppo_ext
from ppo_ext import reference

from . import bench_logprobs, cases, timing, trl_baseline
from .suite import OURS, OURS_IN_PLACE, Case, Implementation, backend, dtype_name, in_float64
from .timing import Traffic

_LOSS_INPUTS = ("old_logprobs", "advantages", "vpreds", "values", "returns", "mask")


def _leaves(inputs, *names):
    return [inputs[name].detach().requires_grad_() for name in names]


def ours(inputs, **options):
    """As in `ppo_ext.PPOTrainer`: the last position predicts nothing, so its mask is 0 and no slice is taken."""
    logits, vpreds = _leaves(inputs, "logits", "vpreds")
    logprobs, entropy = ppo_ext.logprobs_and_entropy(logits, inputs["labels"], mask=inputs["mask"], **options)
    ppo_ext.masked_mean(entropy.detach(), inputs["mask"])
    loss, _ = ppo_ext.ppo_loss(logprobs, **{**{name: inputs[name] for name in _LOSS_INPUTS}, "vpreds": vpreds})
    return torch.autograd.grad(loss, (logits, vpreds))


def _trl_loss(trl):
    """As in TRL's `batched_forward_pass` and `train_minibatch`, on the float32 logits that its models return."""
    def loss(logits, labels, old_logprobs, advantages, vpreds, values, returns, mask):
        logits = logits.float()[:, :-1]
        logprobs = trl.logprobs_from_logits(logits, labels[:, :-1])
        old_logprobs, advantages, vpreds, values, returns, mask = (
            x[:, :-1] for x in (old_logprobs, advantages, vpreds, values, returns, mask))
        pg_loss, vf_loss, _ = trl.loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
        return pg_loss + vf_loss
    return loss


def _trl_head(inputs, loss):
    logits, vpreds = _leaves(inputs, "logits", "vpreds")
    arguments = {**{name: inputs[name] for name in _LOSS_INPUTS}, "vpreds": vpreds}
    return torch.autograd.grad(loss(logits, inputs["labels"], **arguments), (logits, vpreds))


def exact(inputs):
    """Both gradients in float64: through the loss on [B, T], then through the logits some rows at a time."""
    rows = {"logits": inputs["logits"].flatten(0, 1), "labels": inputs["labels"].flatten()}
    [logprobs] = bench_logprobs.by_rows(lambda some: bench_logprobs.forward(some, reference.logprobs), rows)
    per_token = in_float64({name: inputs[name] for name in _LOSS_INPUTS})
    per_token["logprobs"] = logprobs.view_as(per_token["vpreds"])
    leaves = dict(zip(("logprobs", "vpreds"), _leaves(per_token, "logprobs", "vpreds")))
    loss, _ = reference.ppo_loss(**{**per_token, **leaves})
    grad_logprobs, grad_vpreds = torch.autograd.grad(loss, tuple(leaves.values()))
    [grad_logits] = bench_logprobs.by_rows(lambda some: bench_logprobs.forward_backward(some, reference.logprobs),
                                           {**rows, "grad_logprobs": grad_logprobs.flatten()})
    return grad_logits.view_as(inputs["logits"]), grad_vpreds


def _inputs(shape, dtype, device):
    """The old log-probabilities are near the present ones, as within PPO's epochs; the last position is masked."""
    inputs = {**cases.token_inputs(shape[:2], device), **cases.logits_inputs(shape, dtype, device)}
    noise = 0.2 * torch.randn(shape[:2], device=device)
    inputs["old_logprobs"] = ppo_ext.logprobs(inputs["logits"], inputs["labels"]) + noise
    inputs["mask"] = inputs["mask"].long()
    inputs["mask"][:, -1] = 0
    del inputs["ref_logits"]
    return inputs


class HeadCase(Case):
    """Adds to the timed rows one row of peak memory for every implementation that is right."""

    def rows(self, device, *, seconds=2.0):
        rows = super().rows(device, seconds=seconds)
        inputs = self.make(device)
        logits_bytes = inputs["logits"].nbytes
        for timed in [row for row in rows if "p50_ms" in row and row["implementation"] in self.implementations]:
            run = self.implementations[timed["implementation"]].run
            row = {"op": self.op, "pass": "peak memory", "shape": list(self.shape), "dtype": dtype_name(self.dtype),
                   "implementation": timed["implementation"], "backend": backend(device), **timing.stamp(device),
                   "logits_bytes": logits_bytes, "peak_bytes": None, "peak_buffers": None, "note": ""}
            try:
                row["peak_bytes"] = timing.peak_extra_bytes(lambda run=run: run(inputs), device)
                row["peak_buffers"] = row["peak_bytes"] / logits_bytes
            except OSError as error:
                row["note"] = f"the peak cannot be read here: {error}"
            rows.append(row)
        return rows


def suite(device, full):
    shape = cases.head_shape(device)
    for dtype in cases.LOGIT_DTYPES if full else (torch.float32,):
        size = shape[0] * shape[1] * shape[2] * dtype.itemsize
        yield HeadCase(
            "loss_head", "forward+backward", shape, dtype,
            make=lambda device, dtype=dtype: _inputs(shape, dtype, device),
            reference=exact,
            implementations={
                OURS: Implementation(ours),
                OURS_IN_PLACE: Implementation(lambda inputs: ours(inputs, inplace_backward=True), destroys_logits=True,
                                              traffic=Traffic(read=size, update=size)),
                **trl_baseline.baselines(_trl_head, _trl_loss)},
            traffic=Traffic(read=size, copy=size))
