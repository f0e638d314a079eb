"""PPOTrainer: one `step` from queries, responses and scores to an updated policy, with TRL's names and numbers."""

import math
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch

from . import step_inputs
from .agreement import agreed
from .construction import ConstructionMixin
from .critic import check_settings
from .forward import ForwardMixin
from .generation import GenerationMixin
from .head_route import hooks_see_logits
from .loss_terms import entropy_with_gradient, mean_entropy, policy_and_value_loss
from .overrides import is_overridden, replaceable
from .padding import check_padding_id
from .ragged import cut, rows_of_step
from .reporting import ReportingMixin, stack_train_stats
from .resume import ResumeMixin
from .rewards import RewardsMixin
from .rollout import Rollout
from .saving import SavingMixin
from .stats import Clock
from .step_inputs import Batch, Scores, Tensors
from .update_guard import RATIO_MEAN, SKIPPED, all_finite
from .updates import UpdatesMixin


class PPOTrainer(
    ConstructionMixin,
    GenerationMixin,
    ForwardMixin,
    RewardsMixin,
    ReportingMixin,
    SavingMixin,
    ResumeMixin,
    UpdatesMixin,
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

    # ---- training --------------------------------------------------------------------------------------------------

    def _train(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """config.ppo_epochs passes over the rollout, each in a new random order; returns the stacked statistics."""
        rollout = replace(rollout, spans=self._spans(rollout.model_inputs))
        if self._makes_whole_updates():
            return self._train_whole_updates(rollout)
        all_stats = []
        for _ in range(self.config.ppo_epochs):
            for rows in self._minibatches():
                all_stats.append(self._train_on(rollout[rows]))
            if self._early_stop(all_stats[-1]["policy/policykl"]):
                break
        self._check_weights()
        return stack_train_stats(all_stats)

    def _minibatches(self) -> list[list[int]]:
        """Index lists of one epoch, drawn from numpy's global stream as TRL does."""
        size, accumulation = int(self.config.mini_batch_size), int(self.config.gradient_accumulation_steps)
        rows = rows_of_step(max(self._samples), size, accumulation)
        return cut(np.random.permutation(rows).tolist(), size, accumulation)

    def _train_on(self, batch: Rollout) -> dict[str, torch.Tensor]:
        """Forward pass, backward pass and, when enough minibatches are accumulated, the optimizer update.

        Where nobody sees logits, none are made. Otherwise they are given to the methods that a user has replaced, and
        stay as they are. If there are none, only the graph holds the logits: its backward pass may write their gradient
        over them and frees them before it goes on through the layers. A forward hook that sees the logits may keep them,
        so they are not written over then either.
        """
        inputs = (self.model, batch.queries, batch.responses, batch.model_inputs)
        old = (batch.logprobs, batch.values)
        known: dict[str, torch.Tensor] = {} if batch.weights is None else {"weights": batch.weights}
        with torch.enable_grad(), self.accelerator.accumulate(*self._trained_models()):
            if is_overridden(self, "batched_forward_pass", "_forward_pass", "train_minibatch", "loss"):
                logprobs, logits, vpreds, _ = self.batched_forward_pass(
                    *inputs, return_logits=True, response_masks=batch.response_masks
                )
                return self.train_minibatch(
                    *old, logprobs, logits, vpreds, batch.mask, batch.advantages, batch.returns, **known
                )
            scalings = self._head_route.choose(self)
            new = self._forward_pass(
                *inputs,
                batch.response_masks,
                with_entropy=True,
                inplace_backward=scalings is None and self._inplace_backward_allowed(),
                scaling=scalings and scalings.policy,
                spans=scalings and batch.spans,
            )
            return self.train_minibatch(
                *old,
                new.logprobs,
                None,
                new.values,
                batch.mask,
                batch.advantages,
                batch.returns,
                entropy=new.entropy,
                **known,
            )

    def _inplace_backward_allowed(self) -> bool:
        pretrained_model = self.accelerator.unwrap_model(self.model).pretrained_model
        return self.config.inplace_logits_grad and not hooks_see_logits(
            self.model, pretrained_model.get_output_embeddings()
        )

    @replaceable
    def train_minibatch(
        self,
        old_logprobs: torch.Tensor,
        values: torch.Tensor,
        logprobs: torch.Tensor,
        logits: torch.Tensor | None,
        vpreds: torch.Tensor,
        mask: torch.Tensor,
        advantages: torch.Tensor,
        returns: torch.Tensor,
        *,
        entropy: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """One backward pass, and an optimizer update when enough of them are accumulated.

        Arguments are those of `loss`. Returns its statistics.
        """
        given = {"entropy": entropy, "weights": weights}
        known = {name: x for name, x in given.items() if x is not None}  # a replaced loss need not have these arguments
        loss_p, loss_v, train_stats = self.loss(
            old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns, **known
        )
        loss, weight = loss_p + loss_v, self._minibatch_weight
        read = {"old_logprobs": old_logprobs, "values": values, "advantages": advantages, "returns": returns}
        read |= {"logprobs": logprobs.detach(), "vpreds": vpreds.detach(), "mask": mask}
        ratio_facts = (train_stats.pop(SKIPPED, None), train_stats.pop(RATIO_MEAN, None))
        self._update_guard.add(loss, *ratio_facts, read, self._token_weight)
        if not self._leaves_update_out():
            self._backward(loss if weight is None else loss * weight)
            if self.accelerator.sync_gradients:
                self._update()
        self._empty_device_cache()
        return train_stats

    @replaceable
    def loss(
        self,
        old_logprobs: torch.Tensor,
        values: torch.Tensor,
        logits: torch.Tensor | None,
        vpreds: torch.Tensor,
        logprobs: torch.Tensor,
        mask: torch.Tensor,
        advantages: torch.Tensor,
        returns: torch.Tensor,
        *,
        entropy: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """PPO's clipped policy and value loss, with config.entropy_coef also an entropy term.

        Args:
            old_logprobs, values, vpreds, logprobs, mask, advantages, returns: [b, T-1].
            logits: [b, T-1, V] or None. Only the entropy is computed from them, unless it is given.
            entropy: [b, T-1] or None. Without logits as well, the entropy statistic is NaN. With config.entropy_coef one
                of the two is needed, with its gradient.
            weights: [b, T-1] or None, constant factors of the policy loss of each token.

        Returns:
            (policy loss - entropy_coef * entropy, vf_coef * value loss, statistics): two 0-d tensors and a dict of detached
            tensors under TRL's keys without "ppo/"; beside them policy/skipped and policy/ratio_mean, which
            `train_minibatch` takes out.

        Source: TRL 0.11.4, `PPOTrainer.loss`.
        """
        cliprange, high = self.config.cliprange, self.config.cliprange_high
        options: dict[str, Any] = {} if weights is None else {"weights": weights}
        if self.config.entropy_coef > 0:
            entropy = entropy_with_gradient(entropy, logits, logprobs, mask)
            options |= {"entropy": entropy, "entropy_coef": self.config.entropy_coef}
        pg_loss, vf_loss, stats = policy_and_value_loss(
            logprobs,
            old_logprobs,
            advantages,
            vpreds,
            values,
            returns,
            mask,
            vf_coef=self.config.vf_coef,
            cliprange=cliprange if high is None else (cliprange, high),
            cliprange_value=self.config.cliprange_value,
            dual_clip=self.config.dual_clip,
            aggregation=self.config.loss_aggregation,
            **options,
            # in an update of several parts all of them are judged together
            ratio_threshold=self.config.ratio_threshold if self._minibatch_weight is None else math.inf,
        )
        stats["policy/entropy"] = mean_entropy(entropy, logits, mask)
        return pg_loss, vf_loss, stats

    def _backward(self, loss: torch.Tensor) -> None:
        try:
            self.accelerator.backward(loss)
        except RuntimeError as error:
            if not self.config.inplace_logits_grad or "modified by an inplace operation" not in str(error):
                raise
            self._give_up_update(
                "the model must not read its logits in the backward pass, got one that does, such as a model that ends "
                "in tanh or softmax; set PPOConfig(inplace_logits_grad=False)",
                error,
            )

    def _update(self) -> None:
        """An optimizer update over the accumulated minibatches, unless the ratio guard skipped all of them.

        The decision costs one host/device sync. Raises ValueError for a loss or a gradient that is NaN or infinite.
        """
        judged = self._minibatch_weight is not None
        update, finite, skipped_ratios = self._update_guard.decide(self.accelerator, self._trained_params(), judged)
        if not finite:
            self._give_up_update(self._fault())
        self._update_guard.clear()
        for ratio in skipped_ratios:
            self._tell_skipped(ratio)
        if update:
            self._clip_gradients()
            self._update_optimizer()
        self._drop_gradients()

    def _give_up_update(self, fault: str, cause: Exception | None = None) -> NoReturn:
        """Drops the gradients and raises. Weights, optimizer and KL coefficient are those of before this update."""
        self._update_guard.clear()
        self._drop_gradients()
        raise agreed(ValueError(f"PPOTrainer.step: {fault}. This update was not made")) from cause

    def _check_weights(self) -> None:
        """Ends the training of a step: raises ValueError if it made a weight NaN or infinite, before the KL coefficient
        changes."""
        for model in self._trained_models():
            model.eval()
        fault = 1 - all_finite(parameter.detach() for parameter in self._trained_params())
        if self.is_distributed:
            fault = self.accelerator.reduce(fault.to(self.accelerator.device), reduction="sum")
        if fault.item():
            kind = type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__
            raise agreed(
                ValueError(
                    "PPOTrainer.step: the optimizer must keep the weights finite, got NaN or infinity after an update by "
                    f"a finite gradient, from {kind}; go back to weights that were saved, with a smaller learning rate, "
                    "or with weights in float32"
                )
            )

    def _early_stop(self, policykl: torch.Tensor) -> bool:
        """Whether the policy has moved further than 1.5 * config.target_kl, on average over the processes.

        With config.exact_update, policykl is that of the tokens of all processes.
        """
        if not self.config.early_stopping:
            return False
        if self.is_distributed and not self._shares_statistics():
            policykl = self.accelerator.reduce(policykl.clone(), reduction="mean")
        return bool(policykl > 1.5 * self.config.target_kl)
