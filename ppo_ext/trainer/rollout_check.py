"""`step(rollout_logprobs=...)`: the log-probabilities of another engine beside the policy's own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ops.rollout_weights import rollout_weights
from . import rollout_mismatch, step_inputs
from .base import TrainerBase
from .callers import warn
from .chunks import ForwardPass
from .overrides import is_overridden
from .rollout import next_tokens, of_tokens
from .rollout_mismatch import Distributions
from .sharding import is_sharded


class RolloutCheckMixin(TrainerBase):
    """Importance weights for the policy loss, statistics, and one warning that names the likely cause of a mismatch."""

    _warned_of_rollout: bool = False
    batched_forward_pass: Any  # of ForwardMixin

    def _check_rollout_settings(self, rollout_logprobs: Any) -> None:
        """Raises ValueError where the weights that the config asks for cannot be computed or would not be used."""
        kind = self.config.rollout_kind
        if kind is None:
            return
        if rollout_logprobs is None:
            step_inputs.fail("rollout_logprobs", f"be given with PPOConfig.rollout_kind = {kind!r}", None)
        for name in ("loss", "train_minibatch"):
            if is_overridden(self, name):
                step_inputs.fail("PPOConfig.rollout_kind", f"be None where {name} is replaced", repr(kind))

    def _compare_rollout(
        self,
        policy: ForwardPass,
        rollout_logprobs: Sequence[torch.Tensor] | None,
        queries: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor],
        model_inputs: Mapping[str, torch.Tensor],
    ) -> dict[str, Any]:
        """The fields of the Rollout: the engine's log-probabilities in columns, and the weights. Warns of a mismatch."""
        if rollout_logprobs is None:
            return {}
        decoder = "decoder_" if self.is_encoder_decoder else ""
        attention_mask = model_inputs[f"{decoder}attention_mask"]
        found = of_tokens(rollout_logprobs, attention_mask, [*map(len, queries)], self.is_encoder_decoder)
        found = found[:, :-1].masked_fill(policy.mask == 0, 0.0)
        if not self._warned_of_rollout:
            self._warn_of_mismatch(policy, found, queries, responses, model_inputs)
        weights = (
            None if self.config.rollout_kind is None else self._rollout_weights(policy.logprobs, found, policy.mask)[0]
        )
        return {"rollout_logprobs": found, "weights": weights}

    def _rollout_weights(
        self, logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        kind: Any = self.config.rollout_kind or "tis"
        level: Any = self.config.rollout_level
        bounds = (self.config.rollout_low, self.config.rollout_high)
        return rollout_weights(logprobs, rollout_logprobs, mask, kind=kind, level=level, bounds=bounds)

    def _rollout_stats(
        self, logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Under ppo/rollout/: those of `rollout_weights`, the mean difference, and its mean size, in nats per token."""
        _, stats = self._rollout_weights(logprobs, rollout_logprobs, mask)
        counted = mask != 0
        difference = torch.where(counted, rollout_logprobs - logprobs, 0.0)
        n = counted.sum().clamp(min=1)
        stats = {**stats, "kl": difference.sum() / n, "difference": difference.abs().sum() / n}
        return {f"ppo/rollout/{name}": value for name, value in stats.items()}

    def _warn_of_mismatch(
        self,
        policy: ForwardPass,
        rollout_logprobs: torch.Tensor,
        queries: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor],
        model_inputs: Mapping[str, torch.Tensor],
    ) -> None:
        size = rollout_mismatch.difference(policy.logprobs, rollout_logprobs, policy.mask)
        if size <= rollout_mismatch.TOLERANCE:
            return
        self._warned_of_rollout = True
        of_queries = [*map(len, queries)]
        lengths = [of_queries, [q + len(r) for q, r in zip(of_queries, responses, strict=True)]]
        distributions = self._distributions(rollout_logprobs, queries, responses, model_inputs, policy.mask)
        cause = rollout_mismatch.likely_cause(policy.logprobs, rollout_logprobs, policy.mask, lengths, distributions)
        warn(
            f"PPOTrainer.step: rollout_logprobs differ from the policy's own log-probabilities by {size:.3g} nats per "
            f"token. The likely cause is {cause}"
        )

    def _distributions(
        self,
        rollout_logprobs: torch.Tensor,
        queries: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor],
        model_inputs: Mapping[str, torch.Tensor],
        mask: torch.Tensor,
    ) -> Distributions | None:
        """The logits of some tokens, by a pass of one minibatch more; None where that would need other processes."""
        if is_sharded(self.accelerator):
            return None
        rows = slice(0, self.config.mini_batch_size)
        inputs = {name: x[rows] for name, x in model_inputs.items()}
        model = self.accelerator.unwrap_model(self.model)
        with torch.no_grad():
            _, logits, _, _ = self.batched_forward_pass(
                model, queries[rows], responses[rows], inputs, return_logits=True
            )
        counted = (mask[rows] != 0).nonzero()[: rollout_mismatch.TOKENS].unbind(dim=1)
        ids = inputs["decoder_input_ids" if self.is_encoder_decoder else "input_ids"]
        return Distributions(logits[counted], next_tokens(ids)[counted], rollout_logprobs[rows][counted])
