"""Reward models: pairwise training on preferences, and scores of sequences.

A reward model is any transformers `AutoModelForSequenceClassification` with num_labels=1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.nn.functional import logsigmoid

from ..trainer import optimizers
from .fitting import check_schedule, fit
from .sequences import Sample, encode, right_pad


def reward_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margin: torch.Tensor | None = None,
    center_rewards_coefficient: float | None = None,
) -> torch.Tensor:
    """The pairwise (Bradley-Terry) loss.

        -mean(logsigmoid(chosen - rejected - margin)) + center_rewards_coefficient * mean((chosen + rejected)^2)

    Args:
        chosen_rewards, rejected_rewards: [B] or [B, 1] floating.
        margin: [B] or [B, 1]; how much better each chosen sample should score. None: 0.
        center_rewards_coefficient: pulls the rewards of a pair towards a sum of 0; 0.01 is usual. None: off.
    Returns:
        0-d tensor of the rewards' dtype.
    Raises:
        ValueError: the arguments do not have one reward (and one margin) per pair, or there is no pair.
    Source: TRL 0.11.4, `RewardTrainer.compute_loss`; there a [B] margin against [B, 1] rewards gives a [B, B] loss.
    """
    batch = chosen_rewards.shape[0] if chosen_rewards.ndim else 0
    named = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards, "margin": margin}
    flat = {}
    for name, tensor in named.items():
        if tensor is not None and tuple(tensor.shape) not in {(batch,), (batch, 1)} or batch == 0:
            raise ValueError(
                f"reward_loss: {name} must have one value per pair, [{batch}] or [{batch}, 1] with {batch} > 0, "
                f"got shape {list(tensor.shape)}"
            )
        flat[name] = 0.0 if tensor is None else tensor.reshape(batch)
    chosen, rejected = flat["chosen_rewards"], flat["rejected_rewards"]
    loss = -logsigmoid(chosen - rejected - flat["margin"]).mean()
    if center_rewards_coefficient is not None:
        loss = loss + center_rewards_coefficient * (chosen + rejected).square().mean()
    return loss


@dataclass
class RewardConfig:
    """Settings of `RewardTrainer`.

    Raises:
        ValueError: a field is out of its range.
    """

    num_train_epochs: int = 1
    batch_size: int = 32  # pairs per update and process
    eval_batch_size: int = 128
    learning_rate: float = 1e-4  # the peak of the one-cycle schedule
    warmup_ratio: float = 0.1  # share of the steps spent rising to the peak
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    center_rewards_coefficient: float | None = None
    max_length: int | None = None  # longer samples are cut; None: no limit
    seed: int = 0

    def __post_init__(self):
        check_schedule(self)
        if not self.num_train_epochs > 0:
            raise ValueError(f"RewardConfig: num_train_epochs must be > 0, got {self.num_train_epochs}")
        if self.center_rewards_coefficient is not None and self.center_rewards_coefficient < 0:
            raise ValueError(
                f"RewardConfig: center_rewards_coefficient must be >= 0 or None, got {self.center_rewards_coefficient}"
            )


class RewardTrainer:
    """Trains a reward model with `reward_loss` (AdamW, one-cycle learning rate).

    Args:
        model: a sequence classifier with num_labels=1 and a pad_token_id.
        config: see `RewardConfig`.
        tokenizer: a transformers tokenizer; not needed for token ids.
    Raises:
        ValueError: the model has num_labels != 1 or no pad_token_id.
    """

    def __init__(self, model: torch.nn.Module, config: RewardConfig | None = None, tokenizer=None):
        _check_model("RewardTrainer", model)
        self.config = config or RewardConfig()
        self.tokenizer = tokenizer
        self.accelerator = Accelerator()
        optimizer = optimizers.make(
            torch.optim.AdamW, model.parameters(), self.accelerator.device, weight_decay=self.config.weight_decay
        )
        self.pad_token_id = model.config.pad_token_id
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def train(
        self,
        chosen: Sequence[Sample],
        rejected: Sequence[Sample],
        margin: Sequence[float] | None = None,
        on_step: Callable[[dict], None] | None = None,
    ) -> dict[str, float]:
        """Trains in place for `num_train_epochs`; leaves the model in eval mode.

        Args:
            chosen, rejected: texts or token ids, pair by pair.
            margin: one number per pair, or None.
            on_step: called with the record of each update; without it a tqdm bar is shown.
        Returns:
            the last record: {"step", "steps", "loss", "learning_rate", "accuracy"}
        Raises:
            ValueError: lists of different lengths, or empty ones.
            FloatingPointError: the loss is not finite; the weights are then those of the last finite update.
        """
        chosen, rejected, margin = self._encode_pairs("train", chosen, rejected, margin)
        generator = torch.Generator().manual_seed(self.config.seed + self.accelerator.process_index)
        orders = [torch.randperm(len(chosen), generator=generator) for _ in range(self.config.num_train_epochs)]
        batches = [batch for order in orders for batch in order.split(self.config.batch_size)]

        def loss_of(batch):
            rewards = self._rewards([chosen[i] for i in batch], [rejected[i] for i in batch])
            pair_margin = None if margin is None else margin[batch].to(rewards[0].device)
            loss = reward_loss(*rewards, pair_margin, self.config.center_rewards_coefficient)
            return loss, {"accuracy": (rewards[0] > rewards[1]).float().mean().item()}

        return fit(
            "RewardTrainer", self.accelerator, self.model, self.optimizer, batches, len(batches),
            loss_of, self.config, on_step,
        )  # fmt: skip

    @torch.no_grad()
    def evaluate(
        self, chosen: Sequence[Sample], rejected: Sequence[Sample], margin: Sequence[float] | None = None
    ) -> dict[str, float]:
        """Loss and accuracy on held-out pairs.

        Returns:
            {"loss", "accuracy": share of chosen > rejected, "ties": share of equal rewards (they count as wrong),
            "margin": mean difference}
        """
        chosen, rejected, margin = self._encode_pairs("evaluate", chosen, rejected, margin)
        was_training = self.model.training
        self.model.eval()
        size = self.config.eval_batch_size
        parts = [self._rewards(chosen[i : i + size], rejected[i : i + size]) for i in range(0, len(chosen), size)]
        self.model.train(was_training)
        rewards_chosen, rewards_rejected = (torch.cat(side).cpu() for side in zip(*parts, strict=True))
        difference = rewards_chosen - rewards_rejected
        loss = reward_loss(rewards_chosen, rewards_rejected, margin, self.config.center_rewards_coefficient)
        return {
            "loss": loss.item(),
            "accuracy": (difference > 0).float().mean().item(),
            "ties": (difference == 0).float().mean().item(),
            "margin": difference.mean().item(),
        }

    def _rewards(self, chosen: list[torch.Tensor], rejected: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        # One forward over 2B rows, chosen first, as TRL does from 1.0 on.
        return _forward(self.model, chosen + rejected, self.pad_token_id, self.accelerator.device).chunk(2)

    def _encode_pairs(self, method, chosen, rejected, margin):
        name = f"RewardTrainer.{method}"
        if len(chosen) != len(rejected) or len(chosen) == 0:
            raise ValueError(
                f"{name}: chosen and rejected must be equally long and not empty, got {len(chosen)} and {len(rejected)}"
            )
        if margin is not None:
            margin = torch.as_tensor(margin, dtype=torch.float32)
            if margin.shape != (len(chosen),) or not torch.isfinite(margin).all():
                raise ValueError(
                    f"{name}: margin must be {len(chosen)} finite numbers, one per pair, got shape {list(margin.shape)}"
                )
        chosen = encode(f"{name}: chosen", chosen, self.tokenizer, max_length=self.config.max_length)
        rejected = encode(f"{name}: rejected", rejected, self.tokenizer, max_length=self.config.max_length)
        return chosen, rejected, margin


@torch.no_grad()
def score(model, sequences: Sequence[Sample], *, tokenizer=None, batch_size: int = 128) -> torch.Tensor:
    """Scores of sequences by a reward model: reward_gain * logit + reward_bias.

    Gain and bias are the model config's, set by `normalize_rewards`; 1 and 0 where it has none.

    Args:
        model: a sequence classifier with num_labels=1; its mode (train or eval) is restored.
        sequences: texts (needs `tokenizer`) or token ids; no empty one.
    Returns:
        [N] float32, on the CPU.
    Raises:
        ValueError: num_labels != 1, an empty list or sequence, or a score that is not finite.
    """
    _check_model("score", model)
    encoded = encode("score: sequences", sequences, tokenizer)
    was_training = model.training
    model.eval()
    device, pad = next(model.parameters()).device, model.config.pad_token_id
    rewards = torch.cat(
        [_forward(model, encoded[i : i + batch_size], pad, device).cpu() for i in range(0, len(encoded), batch_size)]
    )
    model.train(was_training)
    scores = getattr(model.config, "reward_gain", 1.0) * rewards + getattr(model.config, "reward_bias", 0.0)
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).nonzero()[0])
        raise ValueError(f"score: sequences[{bad}] must get a finite score, got {scores[bad].item()}")
    return scores


def normalize_rewards(model, sequences: Sequence[Sample], *, tokenizer=None, batch_size: int = 128):
    """Sets gain and bias so that the reference `sequences` score mean 0 and standard deviation 1.

    Both go into model.config (reward_gain, reward_bias) and so survive save_pretrained and from_pretrained.

    Returns:
        (gain, bias), floats.
    Raises:
        ValueError: fewer than two sequences, or all of them score the same.
    Source: Ziegler et al. 2019, section 2.1; their gain and bias of the reward model.
    """
    model.config.reward_gain, model.config.reward_bias = 1.0, 0.0
    rewards = score(model, sequences, tokenizer=tokenizer, batch_size=batch_size).double()
    std = rewards.std().item() if len(rewards) > 1 else 0.0
    if std == 0.0:
        raise ValueError(
            f"normalize_rewards: sequences must be at least 2 with different rewards, got {len(rewards)} with sd {std}"
        )
    model.config.reward_gain = 1.0 / std
    model.config.reward_bias = -rewards.mean().item() / std
    return model.config.reward_gain, model.config.reward_bias


def _check_model(name: str, model: torch.nn.Module) -> None:
    if getattr(model.config, "num_labels", None) != 1:
        raise ValueError(f"{name}: model must have num_labels 1, got {getattr(model.config, 'num_labels', None)}")
    if model.config.pad_token_id is None:
        raise ValueError(f"{name}: model.config.pad_token_id must be set, got None; it marks where a sequence ends")


def _forward(model: torch.nn.Module, sequences: list[torch.Tensor], pad_token_id: int, device) -> torch.Tensor:
    """Raw rewards [N] float32 of token sequences, right padded."""
    input_ids, mask = right_pad(sequences, pad_token_id)
    logits = model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
    return logits.reshape(len(sequences)).float()
