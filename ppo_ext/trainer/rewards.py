"""Per-token rewards from scores and the KL penalty, and advantages from rewards and values."""

from collections.abc import Mapping
from typing import Any

import torch

from ..ops.full_kl import full_kl
from ..ops.gae import gae
from ..ops.kl_rewards import kl_rewards
from ..ops.masked import masked_whiten
from . import step_inputs, stopping
from .base import TrainerBase
from .chunks import ForwardPass
from .overrides import is_overridden, replaceable
from .processes import ProcessesMixin


class RewardsMixin(ProcessesMixin, TrainerBase):
    """`PPOTrainer.compute_rewards`, `compute_advantages` and what they need."""

    def _scale_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B] divided by their running standard deviation and clipped, as the config asks."""
        if self.config.use_score_scaling:
            self.running.update(scores[: self._own_samples()])
            scores = self.running.scale(scores, subtract_mean=self.config.use_score_norm)
        clip = self.config.score_clip
        return scores if clip is None else scores.clamp(-clip, clip)

    def _call_compute_rewards(
        self, scores: torch.Tensor, policy: ForwardPass, reference: ForwardPass, kls: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`compute_rewards` with the arguments that TRL gives it, and the divergences that are known already.

        A replaced `compute_rewards` or `_kl_penalty` gets, for kl_penalty "full", the log-probabilities of the whole
        vocabulary [B, T-1, V], as in TRL.
        """
        if kls is not None:
            return self.compute_rewards(scores, policy.logprobs, reference.logprobs, policy.mask, kls=kls)
        logprobs, ref_logprobs = policy.logprobs, reference.logprobs
        if policy.logits is not None and reference.logits is not None:
            logprobs, ref_logprobs = whole_logprobs(policy.logits), whole_logprobs(reference.logits)
        return self.compute_rewards(scores, logprobs, ref_logprobs, policy.mask)

    @replaceable
    def compute_rewards(
        self,
        scores: torch.Tensor,
        logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
        masks: torch.Tensor,
        kls: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per-token rewards: minus kl_coef times the KL penalty, plus the score at the last token that counts.

        Args:
            scores: [B]. masks: [B, T-1].
            logprobs, ref_logprobs: [B, T-1]; for kl_penalty "full" [B, T-1, V] log-probabilities of the whole
                vocabulary, which are not read if kls is given.
            kls: for kl_penalty "full" only: the divergences [B, T-1], if they are known already.

        Returns: (rewards, non_score_rewards, kls), each [B, T-1] float32, 0 where the mask is 0.

        Source: TRL 0.11.4, `PPOTrainer.compute_rewards`.
        """
        penalty = self.config.kl_penalty
        if is_overridden(self, "_kl_penalty"):
            rows = zip(logprobs, ref_logprobs, strict=True)
            penalty, kls = "full", torch.stack([self._kl_penalty(*pair) for pair in rows])
        elif penalty == "full" and kls is None:
            kls = full_kl(logprobs, ref_logprobs, mask=masks)
        return kl_rewards(scores, logprobs, ref_logprobs, masks, kl_coef=self.kl_ctl.value, kl_penalty=penalty, kls=kls)

    @replaceable
    def _kl_penalty(self, logprob: torch.Tensor, ref_logprob: torch.Tensor) -> torch.Tensor:
        """The configured penalty of each token of one row: [T], or [T, V] for "full", -> [T]. Replace it to use another."""
        if self.config.kl_penalty == "full":
            return full_kl(logprob, ref_logprob)
        row, ref_row = logprob.reshape(1, -1), ref_logprob.reshape(1, -1)
        no_score, all_count = row.new_zeros(1), torch.ones_like(row)
        kls = kl_rewards(no_score, row, ref_row, all_count, kl_coef=1.0, kl_penalty=self.config.kl_penalty)[2]
        return kls.reshape(logprob.shape)

    def _check_bootstrap(self) -> None:
        """Raises ValueError for config.bootstrap_truncated where the value after a response is not at hand."""
        if not self.config.bootstrap_truncated:
            return
        for name in ("batched_forward_pass", "_forward_pass", "compute_advantages"):
            if is_overridden(self, name):
                step_inputs.fail("PPOConfig.bootstrap_truncated", f"be False where {name} is replaced", True)
        stop_strings = stopping.setting(self._generating_model(), {}, "stop_strings")
        if stop_strings is not None:
            step_inputs.fail(
                "PPOConfig.bootstrap_truncated", f"be False with the stop_strings {stop_strings!r} of generation", True
            )

    def _generating_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model).pretrained_model

    def _call_compute_advantages(
        self, policy: ForwardPass, rewards: torch.Tensor, model_inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`compute_advantages` with the arguments that TRL gives it and, if the config asks for it, `_bootstrap`."""
        if policy.next_values is None:
            return self.compute_advantages(policy.values, rewards, policy.mask)
        input_ids = model_inputs["decoder_input_ids" if self.is_encoder_decoder else "input_ids"]
        bootstrap = self._bootstrap(policy.next_values, input_ids[:, 1:], policy.mask)
        return self.compute_advantages(policy.values, rewards, policy.mask, bootstrap=bootstrap)

    def _bootstrap(self, next_values: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B]: the value after the last token of each row that counts, 0 where that token is an end id.

        End ids are those of the tokenizer and of the generation config. next_values, tokens, mask: [B, T-1].
        """
        ids = stopping.end_ids(
            self.tokenizer.eos_token_id, stopping.setting(self._generating_model(), {}, "eos_token_id")
        )
        last = mask.shape[1] - 1 - (mask != 0).int().flip(1).argmax(dim=1, keepdim=True)
        ended = torch.isin(tokens.gather(1, last), torch.tensor(ids, dtype=tokens.dtype, device=tokens.device))
        return next_values.gather(1, last).masked_fill(ended, 0.0).squeeze(1)

    @replaceable
    def compute_advantages(
        self,
        values: torch.Tensor,
        rewards: torch.Tensor,
        mask: torch.Tensor,
        bootstrap: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Advantages, whitened over the tokens that count, and returns, of which config.lam_returns is the lambda if given.

        With several processes and config.exact_update these are the tokens of all processes, which must all call it.

        Args: values, rewards, mask: [B, T-1]. bootstrap: [B], the value after the last token that counts; None: 0.
        Returns: (values, advantages, returns), each [B, T-1]; values and advantages are 0 where the mask is 0.

        Source: TRL 0.11.4, `PPOTrainer.compute_advantages`. The results equal TRL's where each row's mask is one block
        and rewards are not whitened, and everywhere with config.gae_through_padding.
        """
        values = values.masked_fill(mask == 0, 0.0)
        gae_mask = None if self.config.gae_through_padding else mask
        group = self._token_group()
        if self.config.whiten_rewards:
            rewards = whiten_rewards(rewards, mask, self.config.gae_through_padding, group)
        advantages, returns = gae(
            values,
            rewards,
            gae_mask,
            gamma=self.config.gamma,
            lam=self.config.lam,
            lam_returns=self.config.lam_returns,
            bootstrap=bootstrap,
        )
        return values, masked_whiten(advantages, mask, group=group), returns


def whole_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary, [..., V] -> [..., V], float32 (float64 for float64 logits)."""
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def whiten_rewards(rewards: torch.Tensor, mask: torch.Tensor, through_padding: bool, group: Any = None) -> torch.Tensor:
    """Rewards divided by the standard deviation of those that count; their mean stays. group: see `masked_whiten`.

    through_padding: as in TRL 0.11.4, the zeros of the masked tokens are transformed as well, which leaves rewards there.
    """
    if through_padding:
        weights = (mask != 0).float().clamp(min=1e-30)  # 1e-30: transformed, and too small to change a moment
        return masked_whiten(rewards.masked_fill(mask == 0, 0.0), weights, shift_mean=False, group=group)
    return masked_whiten(rewards, mask, shift_mean=False, group=group)
