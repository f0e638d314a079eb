"""Forward passes of policy and reference over queries with their responses."""

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorForLanguageModeling

from ..models.modes import recompute_layers_without_dropout
from ..models.token_scores import TokenRequest
from .base import TrainerBase
from .chunks import ForwardPass, divergences, each, forward_chunk, in_columns, join_passes, scored_chunk
from .head_route import Scaling
from .overrides import is_overridden, replaceable
from .padding import input_side, padding_side
from .rollout import (
    Spans,
    counted_tokens,
    join,
    next_tokens,
    position_ids,
    takes_position_ids,
    token_mask,
    token_rows,
    token_spans,
    without_padding,
)


class ForwardMixin(TrainerBase):
    """`PPOTrainer.prepare_model_inputs`, `batched_forward_pass` and what they need."""

    def prepare_model_inputs(self, queries: Sequence[torch.Tensor], responses: Sequence[torch.Tensor]) -> Any:
        """Collated model inputs: input_ids and attention_mask [B, T], for an encoder-decoder also decoder_*.

        Padding is on the tokenizer's side if the model can be told positions, or has no absolute ones; else on the right.
        """

        def collate(samples: Sequence[torch.Tensor]) -> Any:
            with padding_side(self.tokenizer, input_side(self.tokenizer, self._left_padding_is_harmless)):
                collated = self.data_collator(
                    [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in samples]
                )
            if not self._left_padding_is_harmless and not collated["attention_mask"][:, 0].all():
                raise ValueError(
                    "PPOTrainer: training_data_collator must pad on the right for a model that cannot be told "
                    "positions (no position_ids), got padding on the left"
                )
            return collated

        if self.is_encoder_decoder:
            input_data, decoder = collate(queries), collate(responses)
            input_data["decoder_input_ids"] = decoder["input_ids"]
            input_data["decoder_attention_mask"] = decoder["attention_mask"]
        else:
            input_data = collate(
                [torch.cat([query, response]) for query, response in zip(queries, responses, strict=True)]
            )
        input_data.pop("labels", None)  # with labels the model would compute a loss that nobody uses
        return input_data.to(self.current_device)

    def _needs_position_ids(self, model: nn.Module) -> bool:
        """Whether inputs may be padded on the left and the model can be told where its tokens are."""
        collator = self.data_collator
        own = isinstance(collator, DataCollatorForLanguageModeling) and collator.tokenizer is self.tokenizer
        if self.is_encoder_decoder or (own and input_side(self.tokenizer, self._left_padding_is_harmless) == "right"):
            return False
        return takes_position_ids(self.accelerator.unwrap_model(model).pretrained_model)

    def _pad_across_processes(self, model_inputs: Any) -> Any:
        """Pads to the longest T of all processes, so that their statistics have one shape and can be averaged."""
        if self.is_distributed:
            for name, tensor in model_inputs.items():
                model_inputs[name] = self.accelerator.pad_across_processes(
                    tensor,
                    dim=1,
                    pad_index=self.tokenizer.pad_token_id if name.endswith("input_ids") else 0,
                    pad_first=input_side(self.tokenizer, self._left_padding_is_harmless) == "left",
                )
        return model_inputs

    @torch.no_grad()
    def _forward_both(
        self,
        queries: list[torch.Tensor],
        responses: list[torch.Tensor],
        model_inputs: Mapping[str, torch.Tensor],
        response_masks: list[torch.Tensor] | None,
    ) -> tuple[ForwardPass, ForwardPass, torch.Tensor | None]:
        """The forward passes of the policy as it is and of the reference, and their divergences for "full".

        For kl_penalty "full" the divergences [B, T-1] are computed minibatch by minibatch, so that the logits of two
        models exist for one minibatch only. If a user has replaced the methods that take the divergence, the logits of
        the whole batch are kept for them, and no divergences are computed.
        """
        scalings = self._head_route.choose(self)
        ref_model = self.model if self.ref_model is None else self.ref_model
        if scalings is not None:
            whole = (queries, responses, model_inputs, response_masks)
            # a method of the user's may read the values of the padding
            spans = None if is_overridden(self, "compute_advantages") else self._spans(model_inputs)
            policy = self._forward_pass(self.model, *whole, scaling=scalings.policy, spans=spans)
            with self.optional_peft_ctx():
                reference = self._forward_pass(ref_model, *whole, scaling=scalings.reference, spans=spans)
            return policy, reference, None
        full = self.config.kl_penalty == "full"
        keep_logits = full and is_overridden(self, "compute_rewards", "_kl_penalty")
        rows_at_once = self.config.mini_batch_size if full else len(queries)
        policy_parts, reference_parts, kls = [], [], []
        for start in range(0, len(queries), rows_at_once):
            rows = slice(start, start + rows_at_once)
            batch = (queries[rows], responses[rows], {name: x[rows] for name, x in model_inputs.items()})
            options: dict[str, Any] = {"return_logits": full, "response_masks": response_masks and response_masks[rows]}
            if self.config.bootstrap_truncated:
                policy = self._forward_pass(self.model, *batch, **options)
            else:
                policy = ForwardPass(*self.batched_forward_pass(self.model, *batch, **options), None)
            with self.optional_peft_ctx():
                reference = ForwardPass(*self.batched_forward_pass(ref_model, *batch, **options), None)
            if full and not keep_logits:
                kls.append(divergences(policy, reference))
                policy, reference = policy._replace(logits=None), reference._replace(logits=None)
            policy_parts.append(policy)
            reference_parts.append(reference)
        return join_passes(policy_parts), join_passes(reference_parts), join(kls) if kls else None

    @replaceable
    def batched_forward_pass(
        self,
        model: nn.Module,
        queries: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor],
        model_inputs: Mapping[str, torch.Tensor],
        return_logits: bool = False,
        response_masks: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """A forward pass over chunks of config.mini_batch_size samples, in eval mode, so without dropout.

        Args:
            model: the policy or the reference. The values of the policy are those of the critic, if there is one.
            queries, responses: lists of 1-D tensors; only their lengths are read.
            model_inputs: from `prepare_model_inputs`.
            response_masks: None, or a list of 1-D tensors, nonzero where a response token counts.

        Returns:
            (logprobs, logits or None, values, mask): logprobs and values [B, T-1], logits [B, T-1, V] in the model's
            dtype, mask [B, T-1] int64. Logprobs are 0 where the mask is 0. (TRL also fills those.) No backward pass
            changes these logits.

        Source: TRL 0.11.4, `PPOTrainer.batched_forward_pass`.
        """
        result = self._forward_pass(
            model, queries, responses, model_inputs, response_masks, return_logits=return_logits
        )
        return result.logprobs, result.logits, result.values, result.mask

    @replaceable
    def _forward_pass(
        self,
        model: nn.Module,
        queries: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor],
        model_inputs: Mapping[str, torch.Tensor],
        response_masks: Sequence[torch.Tensor] | None = None,
        *,
        return_logits: bool = False,
        with_entropy: bool = False,
        inplace_backward: bool = False,
        scaling: Scaling | None = None,
        spans: Spans | None = None,
    ) -> ForwardPass:
        """See `batched_forward_pass`. inplace_backward: the backward pass may write the gradient over the logits.

        scaling: what the head does to its output; given where no logits are to be made, see `head_route.py`. spans: each
        chunk is cut to the columns of its own samples; the results are 0 in the others.
        """
        critic = self.critic if model is self.model else None
        for part_of_pass in [model] if critic is None else [model, critic]:
            part_of_pass.eval()
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                recompute_layers_without_dropout(part_of_pass)
        policy_moves = torch.is_grad_enabled() and not (critic is not None and self._policy_stands_still())
        with_positions = self._needs_position_ids(model)
        entropy_gradient = with_entropy and self.config.entropy_coef > 0
        parts = []
        for start in range(0, len(queries), self.config.mini_batch_size):
            rows = slice(start, start + self.config.mini_batch_size)
            inputs = {name: x[rows] for name, x in model_inputs.items()}
            width, columns = inputs[f"{self._decoder}input_ids"].shape[1], slice(None)
            if spans is not None:
                inputs, columns = without_padding(inputs, {name: found[rows] for name, found in spans.items()})
            input_ids, attention_mask = inputs[f"{self._decoder}input_ids"], inputs[f"{self._decoder}attention_mask"]
            lengths = ([len(query) for query in queries[rows]], [len(ids) for ids in responses[rows]])
            masks = response_masks and response_masks[rows]
            mask = token_mask(attention_mask, *lengths, masks, self.is_encoder_decoder)
            if with_positions:
                inputs = {"position_ids": position_ids(attention_mask, self._first_position), **inputs}
            labels = next_tokens(input_ids)
            with torch.set_grad_enabled(policy_moves):
                if scaling is None:
                    part = forward_chunk(
                        model, inputs, labels, mask, return_logits, with_entropy, inplace_backward, entropy_gradient
                    )
                else:
                    counted = None if masks else counted_tokens(*lengths, mask.shape[1], self.is_encoder_decoder)
                    request = TokenRequest(
                        labels, mask, token_rows(mask, counted), *scaling, with_entropy, entropy_gradient
                    )
                    part = scored_chunk(model, inputs, request)
            if critic is not None:
                part = part._replace(values=critic(**inputs).to(mask.device))
            parts.append(in_columns(part, columns, width))
        whole = join_passes(parts)
        self._empty_device_cache()
        next_values = whole.values[:, 1:] if self.config.bootstrap_truncated else None
        return each(whole, lambda x: x[:, :-1])._replace(next_values=next_values)

    def _policy_stands_still(self) -> bool:
        """Whether this step is one of the first, which train the critic alone."""
        return self.critic is not None and self.critic_steps < self.config.critic_warmup_steps

    @property
    def why_logits(self) -> str | None:
        """Why the last step had to make logits; None if it did without, or if there was none."""
        return self._head_route.why_logits

    @property
    def _decoder(self) -> str:
        """What the names of the inputs with the responses begin with."""
        return "decoder_" if self.is_encoder_decoder else ""

    def _spans(self, model_inputs: Mapping[str, torch.Tensor]) -> Spans | None:
        """Where the samples are in the padded inputs, if each minibatch may be cut to its own longest sample."""
        return token_spans(model_inputs) if self._padding_is_inert else None

    def _empty_device_cache(self) -> None:
        if self.config.optimize_device_cache and torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
