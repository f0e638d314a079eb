"""PPOTrainer: one `step` from queries, responses and scores to an updated policy, with TRL's names and numbers."""

from typing import Any

import torch

from . import step_inputs
from .construction import ConstructionMixin
from .critic import check_settings
from .generation import GenerationMixin
from .overrides import is_overridden
from .padding import check_padding_id
from .reporting import ReportingMixin
from .resume import ResumeMixin
from .rewards import RewardsMixin
from .rollout import Rollout
from .saving import SavingMixin
from .stats import Clock
from .step_inputs import Batch, Scores, Tensors
from .training import TrainingMixin


class PPOTrainer(
    ConstructionMixin,
    GenerationMixin,
    TrainingMixin,
    RewardsMixin,
    ReportingMixin,
    SavingMixin,
    ResumeMixin,
):
    """PPO on a language model with a value head.

    `generate` samples responses, you score them, `step` trains on them. Everything that `step` does is a method of its
    own with TRL's name, to be called or overridden. T is the padded length of query and response; column t of a
    [B, T-1] tensor is about token t + 1, and masks are 1 where that token belongs to the response.

    Constructor: see `ConstructionMixin.__init__`. Source: TRL 0.11.4, `PPOTrainer`; where the numbers differ, the table
    "Differences from TRL" says so.
    """

    def step(
        self,
        queries: Tensors,
        responses: Tensors,
        scores: Scores,
        response_masks: Tensors | None = None,
        rollout_logprobs: Tensors | None = None,
    ) -> dict[str, Any]:
        """Train on one batch.

        Args:
            queries, responses: lists of config.batch_size 1-D integer tensors, none of them empty.
            scores: one finite number per response: an int, a float, or a tensor of one element.
            response_masks: None, or a list of 1-D tensors, each of its response's length, nonzero where a token counts.
            rollout_logprobs: None, or likewise the log-probabilities with which another engine sampled the tokens.

        Returns: dict of TRL's 40 statistics, floats and numpy arrays; with options more.

        Raises: ValueError or TypeError that names the argument, before any weight has changed.
        """
        clock = Clock()
        queries, responses, checked_scores, response_masks, rollout_logprobs = self._check_together(
            lambda: self._start_step(queries, responses, scores, response_masks, rollout_logprobs)
        )
        with self._interruptible():
            all_scores = self._scale_scores(torch.stack(checked_scores))
            self._push_if_best(all_scores)
            model_inputs = self._pad_across_processes(self.prepare_model_inputs(queries, responses))
            with self._raised_by_all():
                with clock("forward_pass"):
                    policy, reference, kls = self._forward_both(queries, responses, model_inputs, response_masks)
                    compared = self._compare_rollout(policy, rollout_logprobs, queries, responses, model_inputs)
                with clock("compute_rewards"):
                    rewards, non_score_reward, kls = self._call_compute_rewards(all_scores, policy, reference, kls)
            with clock("compute_advantages"):
                values, advantages, returns = self._call_compute_advantages(policy, rewards, model_inputs)
            with clock("optimize_step"):
                batch = (queries, responses, response_masks, model_inputs, policy.logprobs, values, policy.mask)
                rollout = Rollout(*batch, advantages, returns, **compared)
                train_stats = self._train(rollout)
            with clock("calc_stats"):
                stats = self._record(rollout, train_stats, all_scores, reference.logprobs, non_score_reward, kls)
            self._update_schedules(stats["objective/kl"])
            return {**stats, **clock.total()}

    def _update_schedules(self, kl: float) -> None:
        """The KL coefficient and the learning rate of the next step."""
        if not self._policy_stands_still():
            self.kl_ctl.update(kl, sum(self._samples))
        self.critic_steps += self.critic is not None
        if self.lr_scheduler is not None:
            if hasattr(self.lr_scheduler, "split_batches"):  # accelerate's, which else steps once for every process
                self.lr_scheduler.split_batches = self.config.exact_update or self.accelerator.split_batches
            self.lr_scheduler.step()

    # ---- before the first forward pass -----------------------------------------------------------------------------

    def _start_step(
        self, queries: Tensors, responses: Tensors, scores: Scores, masks: Tensors | None, rollout: Tensors | None
    ) -> Batch:
        """Takes up config fields that may have been set since the last step, drops what an interrupted step left, and
        checks the batch."""
        self._discard_unfinished_step()
        self.config.check()
        check_settings(self.config, self.critic)
        self._check_bootstrap()
        self._check_loss_options()
        self.accelerator.gradient_accumulation_steps = self.config.gradient_accumulation_steps
        self.accelerator.step = 0  # minibatches: accumulation begins with the step, also if the config has changed
        ragged, size = self.config.ragged_batches, self.config.batch_size
        if ragged:
            step_inputs.check_ragged(size, queries)
        batch = self._step_safety_checker(None if ragged else size, queries, responses, scores, masks)
        self._has_rollout = rollout is not None
        self._check_rollout_settings(rollout)
        if rollout is not None:
            step_inputs.check_lengths(len(batch[0]), rollout_logprobs=rollout)
        of_tokens = (batch[1], batch[3], self.current_device, self.is_encoder_decoder)
        return *batch, step_inputs.rollout_tensors(rollout, *of_tokens)

    def _check_loss_options(self) -> None:
        """Raises ValueError for options of the loss where a user's own loss is in its place."""
        if not is_overridden(self, "loss"):
            return
        for name, off in (("entropy_coef", 0), ("loss_aggregation", "token_mean")):
            if getattr(self.config, name) != off:
                step_inputs.fail(f"PPOConfig.{name}", f"be {off!r} where loss is replaced", getattr(self.config, name))

    def _step_safety_checker(
        self,
        batch_size: int | None,
        queries: Tensors,
        responses: Tensors,
        scores: Scores,
        masks: Tensors | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor] | None]:
        """Check a batch, see `step`; returns queries, responses, scores (0-d float32) and masks on the device."""
        given = {} if masks is None else {"response_masks": masks}
        step_inputs.check_lengths(batch_size, queries=queries, responses=responses, scores=scores, **given)
        device = self.current_device
        queries = step_inputs.token_ids("queries", queries, device)
        responses = step_inputs.token_ids("responses", responses, device)
        checked_scores = step_inputs.score_tensors(scores, device)
        checked_masks = step_inputs.mask_tensors(masks, responses, device)
        step_inputs.check_context(queries, responses, self._limits, self.is_encoder_decoder)
        lengths = [[*map(len, queries)], [*map(len, responses)]]  # of what is padded
        for rows in lengths if self.is_encoder_decoder else [[q + r for q, r in zip(*lengths, strict=True)]]:
            check_padding_id("PPOTrainer.step", self.tokenizer, self._limits, rows)
        padding = self._padding_watch.count(queries, responses, checked_masks)
        batch = (queries, responses, checked_scores, checked_masks)
        padding_counts = step_inputs.check_contents(
            *batch, self._limits, self.is_encoder_decoder, padding, may_sit_out=self._shares_statistics()
        )
        self._padding_watch.warn("PPOTrainer.step", *padding_counts)
        return batch
