"""Updates of several parts, accumulated or on several processes, that act as one large minibatch of one process."""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from .agreement import first_sentence, gather, is_agreed, is_loss_of_a_process
from .callers import warn
from .overrides import is_overridden
from .processes import ProcessesMixin
from .rollout import Rollout
from .whole_update import (
    denominators_of_minibatches,
    stack_whole_updates,
    tokens_of_minibatches,
    weights_of_minibatches,
)


class UpdatesMixin(ProcessesMixin):
    """What `PPOTrainer._train` and `train_minibatch` do for config.exact_update, and around every update."""

    _left_out: list[bool]  # of each update of this step, whether the ratio guard has left it out
    # of TrainingMixin and ForwardMixin
    _minibatches: Callable[[], list[list[int]]]
    _train_on: Callable[[Rollout], dict[str, torch.Tensor]]
    _early_stop: Callable[[torch.Tensor], bool]
    _check_weights: Callable[[], None]
    _policy_stands_still: Callable[[], bool]
    _give_up_update: Callable[[str], NoReturn]

    def _train_whole_updates(self, rollout: Rollout) -> dict[str, torch.Tensor]:
        """`_train`, in which every minibatch counts by its tokens among those of its update, and so do its statistics."""
        accumulation = int(self.config.gradient_accumulation_steps)
        aggregation = self.config.loss_aggregation
        all_stats: list[dict[str, torch.Tensor]] = []
        tokens, denominators = [], []
        self._left_out = []
        for _ in range(self.config.ppo_epochs):
            minibatches = self._minibatches()
            tokens.append(tokens_of_minibatches(rollout.mask, minibatches))
            found = denominators_of_minibatches(rollout.mask, minibatches, aggregation)
            denominators += [] if found is None else [found]
            weights, of_losses = self._weights(tokens[-1], found)
            for rows, self._token_weight, self._minibatch_weight in zip(
                minibatches, weights.unbind(), of_losses.unbind(), strict=True
            ):
                all_stats.append(self._train_together(rollout[rows], update=len(all_stats) // accumulation))
            if self._early_stop(self._policykl(all_stats[-accumulation:], weights[-accumulation:])):
                break
        self._minibatch_weight = self._token_weight = None
        self._check_weights()
        left_out = [i for i, left in enumerate(self._left_out) if left]
        parts_of = partial(gather, self.accelerator) if self.is_distributed else None
        own = torch.cat(denominators) if denominators else None
        return stack_whole_updates(all_stats, torch.cat(tokens), accumulation, left_out, parts_of, own)

    def _weights(self, tokens: torch.Tensor, denominators: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the means over tokens and the losses of the minibatches of an epoch count in their updates."""
        accumulation = int(self.config.gradient_accumulation_steps)
        if denominators is None:
            weights = weights_of_minibatches(tokens, accumulation, self.accelerator)
            return weights, torch.full_like(weights, accumulation * self.accelerator.num_processes)
        counts = torch.stack([tokens, denominators])
        weights, of_losses = weights_of_minibatches(counts, accumulation, self.accelerator)
        return weights, of_losses

    def _train_together(self, batch: Rollout, update: int) -> dict[str, torch.Tensor]:
        """`_train_on`, whose error on one process is raised by all when they judge the update; no further collective."""
        try:
            return self._train_on(batch)
        except Exception as error:
            if self._can_judge(error, update):
                for model in self._trained_models()[self._policy_stands_still() :]:
                    model.reducer.prepare_for_backward([])  # as the others have in the update's last forward pass
                self._update_guard.judge(self.accelerator, int(self.config.gradient_accumulation_steps), error)
            raise

    def _can_judge(self, error: Exception, update: int) -> bool:
        """Whether this process, which an error has stopped, can still take part in the judgement of the update.

        Not if that is over: the backward pass behind it has collectives, which the process has missed. Not either where
        a forward pass has some, or where DDP has to see the graph of each.
        """
        if not self.is_distributed or len(self._left_out) > update or is_agreed(error) or is_loss_of_a_process(error):
            return False
        plain = [
            isinstance(m, DDP) and not m.find_unused_parameters and not m.static_graph for m in self._trained_models()
        ]
        return all(plain) and not is_overridden(self, "train_minibatch")

    def _policykl(self, stats: list[dict[str, torch.Tensor]], weights: torch.Tensor) -> torch.Tensor:
        """policy/policykl over all tokens of one update, of whose minibatches these are the statistics and weights."""
        if not self.config.early_stopping:
            return stats[-1]["policy/policykl"]
        own = torch.stack([row["policy/policykl"].reshape(()) for row in stats])
        policykl = torch.where(weights > 0, own * weights, 0.0).sum() / (len(stats) * self.accelerator.num_processes)
        return self.accelerator.reduce(policykl, reduction="sum") if self.is_distributed else policykl

    def _leaves_update_out(self) -> bool:
        """Before the backward pass of the last part of an update: whether the mean ratio over all its tokens is too large.

        Then its gradients are dropped; all processes decide alike. Raises ValueError for a loss that is not finite.
        Always False where an update has one part, which the loss itself skips.
        """
        if self._minibatch_weight is None or not self.accelerator.sync_gradients:
            return False
        accumulation = int(self.config.gradient_accumulation_steps)
        ratio, finite = self._update_guard.judge(self.accelerator, accumulation)
        left_out = ratio > self.config.ratio_threshold
        self._left_out.append(left_out)
        if not finite and not left_out:
            self._give_up_update(self._fault())
        if left_out:
            self._update_guard.clear()
            self._drop_gradients()
            self._tell_skipped(ratio, accumulation)
        return left_out

    def _tell_skipped(self, ratio: float, minibatches: int = 1) -> None:
        self.skipped_minibatches += minibatches
        what = "minibatch" if self._minibatch_weight is None else "update"
        warn(
            f"PPOTrainer: the mean ratio of a{'n' * (what == 'update')} {what} is {ratio:.2f}, above ratio_threshold = "
            f"{self.config.ratio_threshold:.2f}; the {what} is skipped",
        )

    def _trained_models(self) -> list[Any]:
        return [self.model] if self.critic is None else [self.model, self.critic]

    def _trained_params(self) -> list[torch.nn.Parameter]:
        return [*self.model_params, *self.critic_params]

    def _clip_gradients(self) -> None:
        """Limits the norm of policy and critic apart: the critic's errors shall not make the policy's update smaller."""
        limit = self.config.max_grad_norm
        if limit is None:
            return
        self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        if self.critic is not None:  # accelerate has undone the loss scaling of both, and would refuse to do so again
            torch.nn.utils.clip_grad_norm_(self.critic.parameters(), limit)

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad()
        for model in self._trained_models():
            model.zero_grad()  # also what the optimizer does not hold: clipping reads the gradients of the whole model

    def _fault(self) -> str:
        """What is not finite, in the words of the first process that has it; the same sentence on all."""
        sentence = first_sentence(self.accelerator, self._update_guard.fault(spread=not self.is_distributed))
        if sentence is None and self.is_distributed:
            sentence = first_sentence(self.accelerator, self._update_guard.fault())
        return sentence or "the gradient must be finite, got NaN or infinity on this or another process"
