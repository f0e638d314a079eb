"""Supervised fine-tuning of a causal language model: next-token prediction on texts or token sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..ops.logprobs import logprobs
from ..trainer import optimizers
from .fitting import check_schedule, fit
from .sequences import Sample, encode, right_pad


@dataclass
class SFTConfig:
    """Settings of `SFTTrainer`.

    Raises:
        ValueError: a field is out of its range.
    """

    max_steps: int = 1000  # optimizer updates
    batch_size: int = 32  # sequences per update and process
    eval_batch_size: int = 128
    learning_rate: float = 2e-5  # the peak of the one-cycle schedule
    warmup_ratio: float = 0.1  # share of the steps spent rising to the peak
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int | None = None  # longer samples are cut; None: the model's context
    seed: int = 0

    def __post_init__(self):
        check_schedule(self)
        if not self.max_steps > 0:
            raise ValueError(f"SFTConfig: max_steps must be > 0, got {self.max_steps}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"SFTConfig: max_length must be >= 2 or None, got {self.max_length}")


class SFTTrainer:
    """AdamW on the mean negative log-probability per token, with a one-cycle learning rate.

    Args:
        model: any transformers causal LM.
        config: see `SFTConfig`.
        train_dataset, eval_dataset: texts (needs `tokenizer`; its EOS is appended) or token ids, each of length >= 2.
        tokenizer: a transformers tokenizer; not needed for token ids.
    Raises:
        ValueError: an empty dataset, a sample under 2 tokens, or a text without a tokenizer.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: SFTConfig,
        train_dataset: Sequence[Sample],
        eval_dataset: Sequence[Sample] | None = None,
        tokenizer=None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.max_length = config.max_length or getattr(model.config, "max_position_embeddings", None)
        self.train_dataset = self._encode(train_dataset, "train_dataset")
        self.eval_dataset = self._encode(eval_dataset, "eval_dataset") if eval_dataset is not None else None
        self.accelerator = Accelerator()
        optimizer = optimizers.make(
            torch.optim.AdamW,
            model.parameters(),
            self.accelerator.device,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.95),
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def train(self, on_step: Callable[[dict], None] | None = None) -> dict[str, float]:
        """Runs `max_steps` updates, in place on the model; leaves it in eval mode.

        Args:
            on_step: called with {"step", "steps", "loss", "learning_rate"} after each update; without it, a tqdm bar.
        Returns:
            {"loss": of the last update, "eval_loss": held-out nats per token, if there is an eval_dataset}
        Raises:
            FloatingPointError: the loss is not finite; the weights are then those of the last finite update.
        """
        steps = self.config.max_steps
        batches = islice(self._batches(), steps)
        record = fit(
            "SFTTrainer", self.accelerator, self.model, self.optimizer, batches, steps,
            lambda batch: (self.loss(*batch), {}), self.config, on_step,
        )  # fmt: skip
        return {"loss": record["loss"]} | (self.evaluate() if self.eval_dataset is not None else {})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """{"eval_loss": mean nats per token over the whole eval_dataset}."""
        if self.eval_dataset is None:
            raise ValueError("SFTTrainer.evaluate: eval_dataset must be given at construction, got None")
        was_training = self.model.training
        self.model.eval()
        nats, tokens = 0.0, 0
        for i in range(0, len(self.eval_dataset), self.config.eval_batch_size):
            input_ids, mask = right_pad(self.eval_dataset[i : i + self.config.eval_batch_size])
            count = int(mask[:, 1:].sum())
            nats += self.loss(input_ids, mask).item() * count
            tokens += count
        self.model.train(was_training)
        return {"eval_loss": nats / tokens}

    def loss(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean negative log-probability per token, 0-d float32. input_ids, mask: [B, T] int64, mask 1 on tokens."""
        device = self.accelerator.device
        input_ids, mask = input_ids.to(device), mask.to(device)
        logits = self.model(input_ids=input_ids, attention_mask=mask).logits
        target_logprobs = logprobs(logits[:, :-1], input_ids[:, 1:], mask=mask[:, 1:])
        return -target_logprobs.sum() / mask[:, 1:].sum()

    def _batches(self):
        # Each process draws its own order: with a few tokens per update, an exact partition of an epoch buys nothing.
        generator = torch.Generator().manual_seed(self.config.seed + self.accelerator.process_index)
        loader = DataLoader(
            self.train_dataset,
            batch_size=min(self.config.batch_size, len(self.train_dataset)),
            shuffle=True,
            drop_last=True,
            generator=generator,
            collate_fn=right_pad,
        )
        while True:
            yield from loader

    def _encode(self, dataset: Sequence[Sample], name: str) -> list[torch.Tensor]:
        # A sample of one token has nothing to predict.
        return encode(
            f"SFTTrainer: {name}", dataset, self.tokenizer, max_length=self.max_length, min_length=2, append_eos=True
        )
