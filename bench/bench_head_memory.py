"""Peak memory of a training minibatch's loss head above its logits, in logits-sized buffers.

The head goes from the model's logits [B, T, V] to the gradients of logits and vpreds: logprobs, entropy as a
statistic, loss with all statistics, backward. The gradient itself is one such buffer (none where it is written over the
logits). TRL's head is its own: `logprobs_from_logits` and `PPOTrainer.loss` on logits[:, :-1].
"""

import dataclasses

import torch

import ppo_ext

from . import cases, timing, trl_baseline
from .suite import OURS, OURS_IN_PLACE, backend, dtype_name

_LOSS_INPUTS = ("old_logprobs", "advantages", "vpreds", "values", "returns", "mask")


def ours(inputs, inplace_backward=False):
    """The gradients of (logits, vpreds). The last position predicts nothing, so its mask is 0 and no slice is taken."""
    logits, vpreds = (inputs[name].detach().requires_grad_() for name in ("logits", "vpreds"))
    logprobs, _ = ppo_ext.logprobs_and_entropy(logits, inputs["labels"], mask=inputs["mask"],
                                               inplace_backward=inplace_backward)
    loss, _ = ppo_ext.ppo_loss(logprobs, **{**{name: inputs[name] for name in _LOSS_INPUTS}, "vpreds": vpreds})
    return torch.autograd.grad(loss, (logits, vpreds))


def trl_head(inputs):
    """The same in TRL 0.11.4's expressions, as `batched_forward_pass` and `train_minibatch` put them together."""
    trl = trl_baseline.functions()
    logits, vpreds = (inputs[name].detach().requires_grad_() for name in ("logits", "vpreds"))
    logprobs = trl.logprobs_from_logits(logits[:, :-1], inputs["labels"][:, :-1])
    old_logprobs, advantages, values, returns, mask = (
        inputs[name][:, :-1] for name in ("old_logprobs", "advantages", "values", "returns", "mask"))
    pg_loss, vf_loss, _ = trl.loss(old_logprobs, values, logits[:, :-1], vpreds[:, :-1], logprobs, mask, advantages,
                                   returns)
    return torch.autograd.grad(pg_loss + vf_loss, (logits, vpreds))


def _inputs(shape, dtype, device):
    sequences, tokens, vocabulary = shape
    per_token = cases.token_inputs((sequences, tokens), device)
    per_token["mask"][:, -1] = 0
    logits = torch.randn(shape, device=device).to(dtype)
    labels = torch.randint(vocabulary, (sequences, tokens), device=device)
    return {**per_token, "logits": logits, "labels": labels}


@dataclasses.dataclass(frozen=True)
class MemoryCase:
    """The heads of one shape and dtype; one row each."""
    shape: tuple
    dtype: torch.dtype

    @property
    def title(self):
        return f"loss head, peak memory {list(self.shape)} {dtype_name(self.dtype)}"

    def rows(self, device, *, seconds):
        torch.manual_seed(0)
        inputs = _inputs(self.shape, self.dtype, device)
        logits_bytes = inputs["logits"].nbytes
        heads = {OURS: ours, OURS_IN_PLACE: lambda x: ours(x, inplace_backward=True), trl_baseline.NAME: trl_head}
        rows = []
        for name, head in heads.items():
            row = {"op": "loss_head", "pass": "peak memory", "shape": list(self.shape),
                   "dtype": dtype_name(self.dtype), "implementation": name, "backend": backend(device),
                   **timing.stamp(device), "logits_bytes": logits_bytes, "peak_buffers": None, "peak_bytes": None,
                   "gradient_buffers": 0 if name == OURS_IN_PLACE else 1, "note": ""}
            try:
                head(inputs)  # the first call also pays for lazy initialisation
                row["peak_bytes"] = timing.peak_extra_bytes(lambda: head(inputs), device)
                row["peak_buffers"] = row["peak_bytes"] / logits_bytes
            except (trl_baseline.Unavailable, OSError, RuntimeError) as error:
                row["note"] = f"{type(error).__name__}: {error}"
            rows.append(row)
        return rows


def suite(device, full):
    dtypes = cases.LOGIT_DTYPES if full else (torch.float32,)
    return [MemoryCase(cases.HEAD[device.type], dtype) for dtype in dtypes]
