"""PPOTrainer: one `step` from queries, responses and scores to an updated policy, with TRL's names and numbers."""

import warnings

import numpy as np
import torch

from ..ops.full_kl import full_kl
from ..ops.gae import gae
from ..ops.kl_rewards import kl_rewards
from ..ops.logprobs import logprobs_and_entropy
from ..ops.masked import masked_mean, masked_whiten
from . import step_inputs
from .construction import ConstructionMixin
from .forward import ForwardMixin
from .generation import GenerationMixin
from .loss_terms import policy_and_value_loss
from .reporting import ReportingMixin, stack_train_stats
from .resume import ResumeMixin
from .rollout import Rollout
from .stats import Clock


class PPOTrainer(ConstructionMixin, GenerationMixin, ForwardMixin, ReportingMixin, ResumeMixin):
    """PPO on a language model with a value head.

    `generate` samples responses, you score them, `step` trains on them. Everything that `step` does is a method of its
    own with TRL's name, to be called or overridden. T is the padded length of query and response; column t of a
    [B, T-1] tensor is about token t + 1, and masks are 1 where that token belongs to the response.

    Constructor: see `ConstructionMixin.__init__`. Source: TRL 0.11.4, `PPOTrainer`; where the numbers differ, the table
    "Differences from TRL" says so.
    """

    def step(self, queries, responses, scores, response_masks=None):
        """Train on one batch.

        Args:
            queries, responses: lists of config.batch_size 1-D integer tensors, none of them empty.
            scores: one finite number per response: an int, a float, or a tensor of one element.
            response_masks: None, or a list of 1-D tensors, each of its response's length, nonzero where a token counts.

        Returns: dict of TRL's 40 statistics, floats and numpy arrays.

        Raises: ValueError or TypeError that names the argument, before any weight has changed.
        """
        clock = Clock()
        self._start_step()
        queries, responses, scores, response_masks = self._step_safety_checker(
            self.config.batch_size, queries, responses, scores, response_masks
        )
        scores = self._scale_scores(torch.stack(scores))
        self._push_if_best(scores)
        with clock("forward_pass"):
            model_inputs = self._pad_across_processes(self.prepare_model_inputs(queries, responses))
            logprobs, ref_logprobs, values, mask = self._score(queries, responses, model_inputs, response_masks)
        with clock("compute_rewards"):
            rewards, non_score_reward, kls = self.compute_rewards(scores, logprobs, ref_logprobs, mask)
        with clock("compute_advantages"):
            values, advantages, returns = self.compute_advantages(values, rewards, mask)
        with clock("optimize_step"):
            rollout = Rollout(
                queries, responses, response_masks, model_inputs, logprobs, values, mask, advantages, returns
            )
            train_stats = self._train(rollout)
        with clock("calc_stats"):
            stats = self._record(
                rollout,
                train_stats,
                scores=scores,
                ref_logprobs=ref_logprobs,
                non_score_reward=non_score_reward,
                kls=kls,
            )
        self.kl_ctl.update(stats["objective/kl"], self.config.batch_size * self.accelerator.num_processes)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return {**stats, **clock.total()}

    # ---- before the first forward pass -----------------------------------------------------------------------------

    def _start_step(self):
        """Config fields may have been set since the last step."""
        self.config.check()
        self.accelerator.gradient_accumulation_steps = self.config.gradient_accumulation_steps

    def _step_safety_checker(self, batch_size, queries, responses, scores, masks=None):
        """Check a batch, see `step`; returns queries, responses, scores (0-d float32) and masks on the device."""
        given = {} if masks is None else {"response_masks": masks}
        step_inputs.check_lengths(batch_size, queries=queries, responses=responses, scores=scores, **given)
        device = self.current_device
        queries = step_inputs.token_ids("queries", queries, device)
        responses = step_inputs.token_ids("responses", responses, device)
        scores = step_inputs.score_tensors(scores, device)
        masks = step_inputs.mask_tensors(masks, responses, device)
        if self._context is not None:
            step_inputs.check_context(queries, responses, self._context, self.is_encoder_decoder)
        step_inputs.check_contents(queries, responses, scores, masks, self._vocab_size, self.is_encoder_decoder)
        return queries, responses, scores, masks

    def _scale_scores(self, scores):
        """Scores [B] divided by their running deviation and clipped, as the config asks."""
        if self.config.use_score_scaling:
            self.running.update(scores)
            scores = self.running.scale(scores, subtract_mean=self.config.use_score_norm)
        clip = self.config.score_clip
        return scores if clip is None else scores.clamp(-clip, clip)

    # ---- rewards and advantages ------------------------------------------------------------------------------------

    def compute_rewards(self, scores, logprobs, ref_logprobs, masks):
        """Per-token rewards: minus kl_coef times the KL penalty, plus the score at the last token that counts.

        Args:
            scores: [B]. masks: [B, T-1].
            logprobs, ref_logprobs: [B, T-1]; for kl_penalty "full" those of `step`, or [B, T-1, V] log-probabilities.

        Returns: (rewards, non_score_rewards, kls), each [B, T-1] float32, 0 where the mask is 0.

        Source: TRL 0.11.4, `PPOTrainer.compute_rewards`.
        """
        penalty, kls = self.config.kl_penalty, None
        if type(self)._kl_penalty is not PPOTrainer._kl_penalty:
            penalty, kls = (
                "full",
                torch.stack([self._kl_penalty(*rows) for rows in zip(logprobs, ref_logprobs, strict=True)]),
            )
        elif penalty == "full":
            kls = self._full_kls.get(logprobs)
            kls = full_kl(logprobs, ref_logprobs, mask=masks) if kls is None else kls
        return kl_rewards(scores, logprobs, ref_logprobs, masks, kl_coef=self.kl_ctl.value, kl_penalty=penalty, kls=kls)

    def _kl_penalty(self, logprob, ref_logprob):
        """The configured penalty of each token, [T], or [T, V] for "full" -> [T]. Override it to use your own."""
        if self.config.kl_penalty == "full":
            return full_kl(logprob, ref_logprob)
        row, ref_row = logprob.reshape(1, -1), ref_logprob.reshape(1, -1)
        no_score, all_count = row.new_zeros(1), torch.ones_like(row)
        kls = kl_rewards(no_score, row, ref_row, all_count, kl_coef=1.0, kl_penalty=self.config.kl_penalty)[2]
        return kls.reshape(logprob.shape)

    def compute_advantages(self, values, rewards, mask):
        """Advantages, whitened over the tokens that count, and returns.

        Args: values, rewards, mask: [B, T-1].
        Returns: (values, advantages, returns), each [B, T-1]; values and advantages are 0 where the mask is 0.

        Source: TRL 0.11.4, `PPOTrainer.compute_advantages`, to which it is equal where each row's mask is one block and
        rewards are not whitened, and everywhere with config.gae_through_padding.
        """
        values = values.masked_fill(mask == 0, 0.0)
        passed_over = None if self.config.gae_through_padding else mask
        if self.config.whiten_rewards:
            rewards = self._whiten_rewards(rewards, mask)
        advantages, returns = gae(values, rewards, passed_over, gamma=self.config.gamma, lam=self.config.lam)
        return values, masked_whiten(advantages, mask), returns

    def _whiten_rewards(self, rewards, mask):
        """Rewards over the standard deviation of those that count. TRL moves the others' zeros with the mean too."""
        if self.config.gae_through_padding:
            weights = (mask != 0).float().clamp(min=1e-30)  # too small a weight to move mean or deviation
            return masked_whiten(rewards.masked_fill(mask == 0, 0.0), weights, shift_mean=False)
        return masked_whiten(rewards, mask, shift_mean=False)

    # ---- training --------------------------------------------------------------------------------------------------

    def _train(self, rollout):
        """config.ppo_epochs passes over the rollout, each in a new random order; returns the stacked statistics."""
        all_stats = []
        for _ in range(self.config.ppo_epochs):
            for rows in self._minibatches():
                all_stats.append(self._train_on(rollout[rows]))
            if self._early_stop(all_stats[-1]["policy/policykl"]):
                break
        self.model.eval()
        return stack_train_stats(all_stats)

    def _minibatches(self):
        """Index lists of one epoch, drawn from numpy's global stream as TRL does."""
        order = np.random.permutation(self.config.batch_size).tolist()
        size = self.config.mini_batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _train_on(self, batch):
        own_loss = self._is_ours("loss", "train_minibatch")
        self._may_overwrite_logits = self.config.inplace_logits_grad and own_loss
        try:
            with self.accelerator.accumulate(self.model):
                logprobs, logits, vpreds, _ = self.batched_forward_pass(
                    self.model,
                    batch.queries,
                    batch.responses,
                    batch.model_inputs,
                    # own ones need no logits: only the graph holds them then, and its backward pass lets go of them
                    return_logits=not (own_loss and self._is_ours("batched_forward_pass")),
                    response_masks=batch.response_masks,
                )
                return self.train_minibatch(
                    batch.logprobs, batch.values, logprobs, logits, vpreds, batch.mask, batch.advantages, batch.returns
                )
        finally:
            self._may_overwrite_logits = False

    def _is_ours(self, *names):
        """Whether these methods are PPOTrainer's own, not a subclass's or set on the trainer. Others may read logits."""
        return all(getattr(getattr(self, name), "__func__", None) is getattr(PPOTrainer, name) for name in names)

    def train_minibatch(self, old_logprobs, values, logprobs, logits, vpreds, mask, advantages, returns):
        """One backward pass, and an optimizer update when enough of them are accumulated.

        Arguments are those of `loss`. Returns its statistics.
        """
        loss_p, loss_v, train_stats = self.loss(
            old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
        )
        self.accelerator.backward(loss_p + loss_v)
        self._update(train_stats.pop("policy/skipped", None), train_stats.pop("policy/ratio_mean", None))
        self._empty_device_cache()
        return train_stats

    def loss(self, old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns):
        """PPO's clipped policy and value loss.

        Args: all [b, T-1], but logits [b, T-1, V], read only for the entropy of log-probabilities that
            `batched_forward_pass` did not make, else None will do.

        Returns:
            (policy loss, vf_coef * value loss, statistics): two 0-d tensors and a dict of detached tensors under TRL's
            keys without "ppo/"; beside them policy/skipped and policy/ratio_mean, which `train_minibatch` takes out.

        Source: TRL 0.11.4, `PPOTrainer.loss`.
        """
        pg_loss, vf_loss, stats = policy_and_value_loss(
            logprobs,
            old_logprobs,
            advantages,
            vpreds,
            values,
            returns,
            mask,
            vf_coef=self.config.vf_coef,
            cliprange=self.config.cliprange,
            cliprange_value=self.config.cliprange_value,
            ratio_threshold=self.config.ratio_threshold,
        )
        entropy = self._entropies.get(logprobs)
        if entropy is None:
            no_labels = torch.zeros_like(mask, dtype=torch.int64)
            entropy = logprobs_and_entropy(logits.detach(), no_labels, mask=mask)[1]
        stats["policy/entropy"] = masked_mean(entropy, mask)
        return pg_loss, vf_loss, stats

    def _update(self, skipped, ratio_mean):
        """An optimizer update over the accumulated mini batches, unless the ratio guard skipped all of them.

        A skipped mini batch has a gradient of 0. An update with that alone would still move the weights, by Adam's
        momentum and by weight decay, so there is none. Knowing that waits for the device once per update, unless
        ratio_threshold is infinite.
        """
        if skipped is not None and self.config.ratio_threshold < float("inf"):
            self._guarded.append(torch.stack([skipped, ratio_mean]))
        if not self.accelerator.sync_gradients:
            return
        guarded, self._guarded = self._guarded, []
        if not guarded or self._any_counts(torch.stack(guarded)):
            if self.config.max_grad_norm is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _any_counts(self, guarded):
        """Whether any mini batch of this update, on any process, was not skipped. guarded: [n, 2]."""
        kept = (1 - guarded[:, :1]).sum()
        if self.is_distributed:
            kept = self.accelerator.reduce(kept, reduction="sum")
        kept, *rows = torch.cat([kept.reshape(1), guarded.flatten()]).tolist()
        for skipped, ratio_mean in zip(rows[::2], rows[1::2], strict=True):
            if skipped:
                self.skipped_minibatches += 1
                warnings.warn(
                    f"PPOTrainer: the mean ratio of a mini batch is {ratio_mean:.2f}, above ratio_threshold = "
                    f"{self.config.ratio_threshold:.2f}; the mini batch is skipped",
                    stacklevel=4,
                )
        return kept > 0

    def _early_stop(self, policykl):
        """Whether the policy has moved further than 1.5 * config.target_kl, on average over the processes."""
        if not self.config.early_stopping:
            return False
        if self.is_distributed:
            policykl = self.accelerator.reduce(policykl.clone(), reduction="mean")
        return bool(policykl > 1.5 * self.config.target_kl)
