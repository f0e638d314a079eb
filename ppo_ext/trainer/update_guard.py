"""The guard before every optimizer update: skipped minibatches, and losses and gradients that are not finite."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator

from .agreement import raise_first
from .sharding import is_sharded

# statistics of the loss for the guard, which `PPOTrainer.train_minibatch` takes out
SKIPPED, RATIO_MEAN = "policy/skipped", "policy/ratio_mean"

# what the loss is made of, in the order in which one makes the next ones infinite or NaN, and where it comes from
_SOURCES = {
    "old_logprobs": "the logits of the policy before the update",
    "values": "the values of the value head before the update",
    "advantages": "the advantages, which come from the scores, the KL penalty (the logits of the reference) and the values",
    "returns": "the returns, which come from the scores, the KL penalty (the logits of the reference) and the values",
    "logprobs": "the logits of the policy",
    "vpreds": "the values of the value head",
}


class Decision(NamedTuple):
    """What becomes of one update. The first two are alike on all processes."""

    update: bool  # on some process a minibatch was not skipped
    finite: bool  # all losses and gradients of all processes are
    skipped_ratios: list[float]  # mean ratios of the minibatches that were skipped on this process


class UpdateGuard:
    """Collects what the loss says of each minibatch until the optimizer update that they accumulate to.

    The loss gives a minibatch whose mean ratio is too large a gradient of 0. An update from such minibatches alone would
    still move the weights, by Adam's momentum and by weight decay, so the trainer leaves it out. An update by a gradient
    that is infinite or NaN would lose all weights, so the trainer stops. All processes decide alike: one that left out
    an update alone would end up with other weights.
    """

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._inputs: list[Mapping[str, torch.Tensor]] = []
        self._ratios: list[torch.Tensor] = []  # weighted

    def clear(self) -> None:
        """Forgets the minibatches of an update that will not be made."""
        self._rows, self._inputs, self._ratios = [], [], []

    def judge(self, accelerator: Accelerator, accumulation: int, error: Exception | None = None) -> tuple[float, bool]:
        """Before the last backward pass of an update: (mean ratio over all its tokens, whether all its losses are finite).

        The same on all processes. One host/device sync, and with several processes one collective.

        error: that of a minibatch of this process; then it is raised, by all.
        """
        votes = torch.zeros(3, device=accelerator.device)
        if error is None:
            finite = torch.stack([row[0] for row in self._rows]).min()
            votes = torch.stack([torch.stack(self._ratios).sum(), 1 - finite, torch.zeros_like(finite)])
        else:
            votes[2] = 1
        if accelerator.num_processes > 1:
            votes = accelerator.reduce(votes, reduction="sum")
        ratio, faults, errors = votes.tolist()
        if errors:
            raise_first(accelerator, error)
        return ratio / (accumulation * accelerator.num_processes), faults == 0

    def add(
        self,
        loss: torch.Tensor,
        skipped: torch.Tensor | None,
        ratio_mean: torch.Tensor | None,
        inputs: Mapping[str, torch.Tensor],
        weight: torch.Tensor | None = None,
    ) -> None:
        """Takes note of one minibatch.

        Args:
            loss: 0-d. skipped: 0-d, 1 or 0. ratio_mean: 0-d, the mean ratio. None for a loss that tells neither.
            inputs: what the loss was made of, by name, with the mask; read only if the loss is not finite.
            weight: 0-d, of the minibatch in its update; None: `judge` will not be called.
        """
        if weight is not None:
            ratio = torch.zeros_like(loss) if ratio_mean is None else ratio_mean
            self._ratios.append(torch.where(weight > 0, ratio.detach() * weight, 0.0))
        facts = [loss.detach().isfinite(), *(torch.zeros_like(loss) if x is None else x for x in (skipped, ratio_mean))]
        self._rows.append(torch.stack([fact.detach().to(torch.float32).reshape(()) for fact in facts]))
        self._inputs.append(inputs)

    def decide(
        self, accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter], judged: bool = False
    ) -> Decision:
        """Ends the collection for one update; one host/device sync. `clear` has to follow.

        judged: the losses are known to be finite on all processes, by `judge`. Then only sharded gradients need a
        collective: where every process holds whole ones, they are the same.
        parameters: those whose gradients are looked at. A gradient scaler does that itself, and then skips the update.
        """
        if not self._rows:
            return Decision(True, True, [])
        table = torch.stack(self._rows)  # [minibatches, 3]
        finite = table[:, 0].min()
        if accelerator.scaler is None:
            gradients = all_finite(p.grad for p in parameters if p.grad is not None)
            finite = finite * gradients.to(finite.device)
        votes = torch.stack([(1 - table[:, 1]).sum(), 1 - finite])
        if accelerator.num_processes > 1 and (is_sharded(accelerator) or not judged):
            votes = accelerator.reduce(votes, reduction="sum")
        kept, faults, *flat = torch.cat([votes, table[:, 1:].flatten()]).tolist()
        ratios = [ratio for skipped, ratio in zip(flat[::2], flat[1::2], strict=True) if skipped]
        return Decision(kept > 0, faults == 0, ratios)

    def fault(self, spread: bool = True) -> str | None:
        """What is not finite in the minibatches of this process, in words; None if it is no loss of theirs.

        spread: also tell of advantages, which whitening makes NaN on all processes if they are on one.
        """
        for inputs, row in zip(self._inputs, self._rows, strict=True):
            for name, source in _SOURCES.items():
                counted = inputs[name][inputs["mask"] != 0]
                bad = counted.numel() - int(counted.isfinite().sum())
                if bad and name == "advantages" and not spread:
                    row = torch.ones_like(row)
                elif bad:
                    return f"the loss must be finite, got {bad} of {counted.numel()} NaN or infinite {name}: {source}"
            if not row[0]:
                largest = max(_SOURCES, key=lambda name: inputs[name].abs().max().item())
                value = inputs[largest].abs().max().item()
                return f"the loss must be finite, got an overflow from {largest} up to {value:.3g}: {_SOURCES[largest]}"
        return None


def all_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """1.0 or 0.0, 0-d float32. The extremes are looked at, since a sum of squares of float16 would overflow."""
    parts = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]  # FSDP2: the shard of this process
    parts = [part.coalesce().values() if part.is_sparse else part for part in parts]
    parts = [part for part in parts if part.numel()]
    if not parts:
        return torch.ones((), dtype=torch.float32, device="cpu")
    if all(part.device.type == "cpu" for part in parts):  # where norms are slow
        extremes = torch.stack([extreme.to(torch.float64) for part in parts for extreme in part.aminmax()])
        return extremes.isfinite().all().to(torch.float32)
    largest = torch.nn.utils.get_total_norm(parts, norm_type=float("inf"))
    return largest.isfinite().to(torch.float32)
