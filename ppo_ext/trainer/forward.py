"""Scoring responses: model inputs, forward passes of policy and reference, and what of their logits is kept."""

import gc

import torch

from ..ops.full_kl import full_kl
from ..ops.logprobs import logprobs as token_logprobs
from ..ops.logprobs import logprobs_and_entropy
from .rollout import join, next_tokens, position_ids, takes_position_ids, token_mask


class ForwardMixin:
    """`PPOTrainer.prepare_model_inputs`, `batched_forward_pass` and what they need."""

    def prepare_model_inputs(self, queries, responses):
        """Collated model inputs: input_ids and attention_mask [B, T], for an encoder-decoder also decoder_*."""

        def collate(samples):
            return self.data_collator([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in samples])

        if self.is_encoder_decoder:
            input_data, decoder = collate(queries), collate(responses)
            input_data["decoder_input_ids"] = decoder["input_ids"]
            input_data["decoder_attention_mask"] = decoder["attention_mask"]
        else:
            input_data = collate(
                [torch.cat([query, response]) for query, response in zip(queries, responses, strict=True)]
            )
        input_data.pop("labels", None)  # the model would compute a loss of its own
        return input_data.to(self.current_device)

    def _pad_across_processes(self, model_inputs):
        """All processes get the longest T, so that their statistics have one shape."""
        if self.is_distributed:
            for name, tensor in model_inputs.items():
                model_inputs[name] = self.accelerator.pad_across_processes(
                    tensor,
                    dim=1,
                    pad_index=self.tokenizer.pad_token_id if name.endswith("input_ids") else 0,
                    pad_first=self.tokenizer.padding_side == "left",
                )
        return model_inputs

    @torch.no_grad()
    def _score(self, queries, responses, model_inputs, response_masks):
        """(logprobs, ref_logprobs, values, mask), each [B, T-1], under the policy as it is and the reference.

        For kl_penalty "full" the two models' logits of one mini batch exist at a time, and the divergences are kept for
        `compute_rewards`.
        """
        full = self.config.kl_penalty == "full"
        rows_at_once = self.config.mini_batch_size if full else len(queries)
        parts = []
        for start in range(0, len(queries), rows_at_once):
            rows = slice(start, start + rows_at_once)
            batch = (queries[rows], responses[rows], {name: x[rows] for name, x in model_inputs.items()})
            options = {"return_logits": full, "response_masks": response_masks and response_masks[rows]}
            logprobs, logits, values, mask = self.batched_forward_pass(self.model, *batch, **options)
            with self.optional_peft_ctx():
                ref_model = self.model if self.is_peft_model else self.ref_model
                ref_logprobs, ref_logits, _, _ = self.batched_forward_pass(ref_model, *batch, **options)
            kls = [full_kl(logits, ref_logits, mask=mask)] if full else []
            parts.append((logprobs, ref_logprobs, values, mask, *kls))
        logprobs, ref_logprobs, values, mask, *kls = map(join, zip(*parts, strict=True))
        if full:
            self._full_kls[logprobs] = kls[0]
        return logprobs, ref_logprobs, values, mask

    def batched_forward_pass(self, model, queries, responses, model_inputs, return_logits=False, response_masks=None):
        """Score responses in chunks of config.mini_batch_size, in eval mode, so without dropout.

        Args:
            queries, responses: lists of 1-D tensors; only their lengths are read.
            model_inputs: from `prepare_model_inputs`.
            response_masks: None, or a list of 1-D tensors, nonzero where a response token counts.

        Returns:
            (logprobs, logits or None, values, mask): logprobs and values [B, T-1], logits [B, T-1, V] in the model's
            dtype, mask [B, T-1] int64. Logprobs are 0 where the mask is 0. (TRL also fills those.)
        """
        model.eval()
        self._recompute_in_backward(model)
        with_entropy = torch.is_grad_enabled()
        parts = []
        for start in range(0, len(queries), self.config.mini_batch_size):
            rows = slice(start, start + self.config.mini_batch_size)
            chunk = {name: x[rows] for name, x in model_inputs.items()}
            masks = response_masks and response_masks[rows]
            scored = self._forward(model, queries[rows], responses[rows], chunk, masks, with_entropy)
            parts.append(scored if return_logits else {**scored, "logits": None})
        whole = {
            name: None if parts[0][name] is None else join([part[name] for part in parts])[:, :-1] for name in parts[0]
        }
        if with_entropy:
            self._entropies[whole["logprobs"]] = whole["entropy"]
        self._empty_device_cache()
        return whole["logprobs"], whole["logits"], whole["values"], whole["mask"]

    def _forward(self, model, queries, responses, chunk, response_masks, with_entropy):
        """One forward pass; every result has T columns, the last of which is masked.

        The op gets all the logits, not a slice of them: the gradient of a slice would be one more tensor of their size.
        """
        decoder = "decoder_" if self.is_encoder_decoder else ""
        input_ids, attention_mask = chunk[f"{decoder}input_ids"], chunk[f"{decoder}attention_mask"]
        mask = token_mask(
            attention_mask,
            [len(query) for query in queries],
            [len(ids) for ids in responses],
            response_masks,
            self.is_encoder_decoder,
        )
        if self.tokenizer.padding_side == "left" and not self.is_encoder_decoder:
            if takes_position_ids(self.accelerator.unwrap_model(model).pretrained_model):
                chunk = {"position_ids": position_ids(attention_mask), **chunk}
        logits, _, values = model(**chunk)
        labels, entropy = next_tokens(input_ids), None
        if with_entropy:
            logprobs, entropy = logprobs_and_entropy(
                logits, labels, mask=mask, inplace_backward=self._may_overwrite_logits
            )
            entropy = entropy.detach()
        else:
            logprobs = token_logprobs(logits, labels, mask=mask)
        return {"logprobs": logprobs, "logits": logits, "values": values, "mask": mask, "entropy": entropy}

    def _recompute_in_backward(self, model):
        """Switch gradient checkpointing on without dropout: transformers recomputes only layers in training mode.

        A layer that would apply a dropout of its own in that mode stays in eval mode, and is not recomputed.
        """
        if not (self.config.gradient_checkpointing and torch.is_grad_enabled()):
            return
        for module in model.modules():
            drops = any("dropout" in name and isinstance(p, float) and p > 0 for name, p in vars(module).items())
            module.training = getattr(module, "gradient_checkpointing", False) and not drops

    def _empty_device_cache(self):
        if self.config.optimize_device_cache and torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
