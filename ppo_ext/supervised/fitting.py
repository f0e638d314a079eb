"""The training loop that supervised fine-tuning and reward models share: AdamW updates under a one-cycle schedule."""

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm


def fit(
    name: str,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable,
    steps: int,
    loss_of: Callable[..., tuple[torch.Tensor, dict[str, float]]],
    config,
    on_step: Callable[[dict], None] | None,
) -> dict[str, float]:
    """One update per batch, in place; leaves the model in eval mode.

    Args:
        name: the class, for errors and the bar.
        model, optimizer: as prepared by the accelerator.
        batches, steps: what to train on, and how many batches that is.
        loss_of: batch -> (0-d loss, further numbers to report).
        config: has learning_rate (the peak), warmup_ratio and max_grad_norm.
        on_step: called with the record of each update; without it a tqdm bar is shown.
    Returns:
        the record of the last update: {"step", "steps", "loss", "learning_rate", ...}
    Raises:
        FloatingPointError: the loss is not finite; the weights are then those of the last finite update.
    """
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer.optimizer, max_lr=config.learning_rate, total_steps=steps + 1, pct_start=config.warmup_ratio
    )
    record = {}
    model.train()
    with tqdm(total=steps, desc=name, disable=on_step is not None) as bar:
        for step, batch in enumerate(batches, 1):
            loss, further = loss_of(batch)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"{name}: loss must be finite, got {loss.item()} at step {step}; lower learning_rate"
                )
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            record = {"step": step, "steps": steps, "loss": loss.item(), "learning_rate": rate} | further
            bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
            bar.update()
            if on_step is not None:
                on_step(record)
    model.eval()
    return record


def check_schedule(config) -> None:
    """ValueError if a field that `fit` or batching goes by is out of range."""
    name = type(config).__name__
    for field in ("batch_size", "eval_batch_size", "learning_rate", "max_grad_norm"):
        if not getattr(config, field) > 0:
            raise ValueError(f"{name}: {field} must be > 0, got {getattr(config, field)}")
    if not 0 <= config.warmup_ratio < 1:
        raise ValueError(f"{name}: warmup_ratio must be in [0, 1), got {config.warmup_ratio}")
