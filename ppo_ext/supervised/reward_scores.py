"""Scores of sequences by a reward model, and their normalisation.

A reward model is any transformers `AutoModelForSequenceClassification` with num_labels=1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.limits import limits_of
from ..models.modes import evaluating
from .sequences import Sample, encode, right_pad


@torch.no_grad()
def reward_scores(
    model: torch.nn.Module, sequences: Sequence[Sample], *, tokenizer: Any = None, batch_size: int = 128
) -> torch.Tensor:
    """Scores of sequences by a reward model: reward_gain * logit + reward_bias.

    Gain and bias are fields of the model's config, set by `normalize_rewards`; 1 and 0 where the config has none.

    Args:
        model: a sequence classifier with num_labels=1; the modes of its modules are restored.
        sequences: texts (needs `tokenizer`) or token ids; none of them empty.
        tokenizer: a transformers tokenizer; not needed for token ids.
        batch_size: sequences per forward pass.
    Returns:
        [N] float32, on the CPU.
    Raises:
        ValueError: num_labels != 1, no pad_token_id, a language model, an empty list or sequence, a sequence that the
            model cannot read, or a score that is not finite.
    """
    check_reward_model("reward_scores", model)
    encoded = encode("reward_scores: sequences", sequences, tokenizer, limits_of(model))
    with evaluating(model):
        parts = [_rewards(model, encoded[i : i + batch_size]) for i in range(0, len(encoded), batch_size)]
    config: Any = model.config
    scores = getattr(config, "reward_gain", 1.0) * torch.cat(parts) + getattr(config, "reward_bias", 0.0)
    if not torch.isfinite(scores).all():
        bad = int((~torch.isfinite(scores)).nonzero()[0])
        raise ValueError(f"reward_scores: sequences[{bad}] must get a finite score, got {scores[bad].item()}")
    return scores


def normalize_rewards(
    model: torch.nn.Module, sequences: Sequence[Sample], *, tokenizer: Any = None, batch_size: int = 128
) -> tuple[float, float]:
    """Sets gain and bias so that `reward_scores` of these reference sequences have mean 0 and standard deviation 1.

    Both are written to model.config (reward_gain, reward_bias), so save_pretrained and from_pretrained keep them. If it
    raises, they are as before.

    Returns:
        (gain, bias).
    Raises:
        ValueError: fewer than two sequences, or all of them have the same score.
    Source: Ziegler et al. 2019, section 2.1, which normalises the reward model by a gain and a bias.
    """
    config: Any = model.config
    before = {name: getattr(config, name) for name in ("reward_gain", "reward_bias") if hasattr(config, name)}
    config.reward_gain, config.reward_bias = 1.0, 0.0
    try:
        rewards = reward_scores(model, sequences, tokenizer=tokenizer, batch_size=batch_size).double()
    finally:
        del config.reward_gain, config.reward_bias
        config.update(before)
    std = rewards.std().item() if len(rewards) > 1 else 0.0
    if std == 0.0:
        raise ValueError(
            f"normalize_rewards: sequences must be at least 2 with different rewards, got {len(rewards)} with sd {std}"
        )
    config.reward_gain = 1.0 / std
    config.reward_bias = -rewards.mean().item() / std
    return config.reward_gain, config.reward_bias


def check_reward_model(name: str, model: torch.nn.Module) -> None:
    """ValueError unless the model is a classifier with one label that knows its padding token."""
    config: Any = model.config
    get_base_model = getattr(model, "get_base_model", None)  # of a peft model
    base: Any = model if get_base_model is None else get_base_model()
    if isinstance(base, PreTrainedModel) and base.can_generate():
        raise ValueError(
            f"{name}: model must be a sequence classifier, got the language model {type(base).__name__}; load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"
        )
    if getattr(config, "num_labels", None) != 1:
        raise ValueError(f"{name}: model must have num_labels 1, got {getattr(config, 'num_labels', None)}")
    if config.pad_token_id is None:
        raise ValueError(f"{name}: model.config.pad_token_id must be set, got None; it marks where a sequence ends")
    end = limits_of(model).vocabulary
    if end is not None and not 0 <= config.pad_token_id < end:
        raise ValueError(
            f"{name}: model.config.pad_token_id must lie in the vocabulary [0, {end}), got {config.pad_token_id}; call "
            "model.resize_token_embeddings(len(tokenizer))"
        )


def _rewards(model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    """The model's logits [N] float32, on the CPU, of N token sequences."""
    device = next(model.parameters()).device
    input_ids = right_pad(rows, model.config.pad_token_id).to(device)
    mask = right_pad([[1] * len(row) for row in rows]).to(device)  # by length: a row may hold the padding token's id
    return one_score_each("reward_scores", model(input_ids=input_ids, attention_mask=mask).logits).cpu()


def one_score_each(name: str, logits: torch.Tensor) -> torch.Tensor:
    """Logits [N, 1] or [N] as scores [N] float32; ValueError for any others, such as one per token."""
    if logits.dim() > 2 or logits.numel() != len(logits):
        raise ValueError(
            f"{name}: model must give one score per sequence, logits [{len(logits)}, 1], got {list(logits.shape)}"
        )
    return logits.reshape(-1).float()
