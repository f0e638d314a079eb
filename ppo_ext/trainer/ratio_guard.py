"""The ratio guard: minibatches whose mean ratio is too large are skipped, and so are updates made of them alone."""

import torch
from accelerate import Accelerator

# statistics of the loss for the guard, which `PPOTrainer.train_minibatch` takes out
SKIPPED, RATIO_MEAN = "policy/skipped", "policy/ratio_mean"


class RatioGuard:
    """Collects what the loss says of each minibatch until the optimizer update that they accumulate to.

    The loss gives a skipped minibatch a gradient of 0. An update from skipped minibatches alone would still move the
    weights, by Adam's momentum and by weight decay, so the trainer leaves it out. All processes decide alike, because
    one that left out an update alone would end up with other weights.
    """

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []

    def add(self, skipped: torch.Tensor, ratio_mean: torch.Tensor) -> None:
        """Takes note of one minibatch: skipped is 1 or 0, ratio_mean its mean ratio; both 0-d."""
        self._rows.append(torch.stack([skipped, ratio_mean]))

    def decide(self, accelerator: Accelerator) -> tuple[bool, list[float]]:
        """Ends the collection for one update; one host/device sync, or none if no minibatch was added.

        Returns:
            (whether the update happens, mean ratios of the minibatches that were skipped on this process). It happens
            if on any process a minibatch was not skipped.
        """
        rows, self._rows = self._rows, []
        if not rows:
            return True, []
        table = torch.stack(rows)  # [minibatches, 2]
        kept = (1 - table[:, :1]).sum()
        if accelerator.num_processes > 1:
            kept = accelerator.reduce(kept, reduction="sum")
        kept_on_host, *flat = torch.cat([kept.reshape(1), table.flatten()]).tolist()
        skipped_ratios = [ratio for skipped, ratio in zip(flat[::2], flat[1::2], strict=True) if skipped]
        return kept_on_host > 0, skipped_ratios
