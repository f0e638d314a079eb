"""The training of a step: passes over the rollout in minibatches, with PPO's loss, and the updates."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch

from .agreement import agreed
from .forward import ForwardMixin
from .head_route import hooks_see_logits
from .loss_terms import entropy_with_gradient, mean_entropy, policy_and_value_loss
from .overrides import is_overridden, replaceable
from .ragged import cut, rows_of_step
from .reporting import stack_train_stats
from .rollout import Rollout
from .update_guard import RATIO_MEAN, SKIPPED, all_finite
from .updates import UpdatesMixin


class TrainingMixin(ForwardMixin, UpdatesMixin):
    """TRL's `train_minibatch` and `loss`, and what calls them."""

    _update_optimizer: Callable[[], None]  # of InterruptionMixin

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
