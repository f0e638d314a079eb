"""Sampling responses from the policy and the reference, in TRL's batches and with TRL's trimming."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .base import TrainerBase


class GenerationMixin(TrainerBase):
    """`PPOTrainer.generate` and what it needs."""

    def generate(
        self,
        query_tensor: torch.Tensor | list[torch.Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to each query.

        Args:
            query_tensor: a list of 1-D int64 tensors, or one 1-D tensor.
            length_sampler: called once per batch for max_new_tokens.
            batch_size: number of queries that are generated together; for a list only.
            return_prompt: keep the query in front of the response (decoder-only models).
            generate_ref_response: also sample from the reference model.
            generation_kwargs: handed to the model's `generate`; for a list also `remove_padding` (default True: cut
                after the first end-of-sequence token of the response) and `pad_to_multiple_of`.

        Returns: a list of 1-D tensors for a list, a tensor [1, length] for a tensor; a pair of these with
        generate_ref_response.

        The models are in eval mode meanwhile, since `step` computes the log-probabilities of the responses without
        dropout. (TRL samples with dropout from the second step on.)

        Source: TRL 0.11.4, `PPOTrainer.generate`.
        """
        if isinstance(query_tensor, list):
            sample: Callable[..., Any] = self._generate_batched
            options = {"length_sampler": length_sampler, "batch_size": batch_size, "return_prompt": return_prompt}
        elif query_tensor.dim() != 1:
            raise ValueError(
                "PPOTrainer.generate: query_tensor must be a 1-D tensor or a list of 1-D tensors, got shape "
                f"{list(query_tensor.shape)}"
            )
        else:
            sample = self._generate_one
            options = {"length_sampler": length_sampler, "return_prompt": return_prompt}
        response = sample(self.model, query_tensor, **options, **generation_kwargs)
        if not generate_ref_response:
            return response
        with self.optional_peft_ctx():
            ref_model = self.model if self.ref_model is None else self.ref_model
            return response, sample(ref_model, query_tensor, **options, **generation_kwargs)

    def _generate_one(
        self,
        model: Any,
        query: torch.Tensor,
        length_sampler: Callable[[], int] | None,
        return_prompt: bool,
        **generation_kwargs: Any,
    ) -> torch.Tensor:
        if length_sampler is not None:
            generation_kwargs["max_new_tokens"] = length_sampler()
        with self._unwrapped_for_generation(model) as unwrapped:
            response = unwrapped.generate(input_ids=query.unsqueeze(0), **generation_kwargs)
        return response if return_prompt or self.is_encoder_decoder else response[:, len(query) :]

    def _generate_batched(
        self,
        model: Any,
        query_tensors: list[torch.Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        pad_to_multiple_of: int | None = None,
        remove_padding: bool = True,
        **generation_kwargs: Any,
    ) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        for start in range(0, len(query_tensors), batch_size):
            if length_sampler is not None:
                generation_kwargs["max_new_tokens"] = length_sampler()
            queries = query_tensors[start : start + batch_size]
            inputs = self._pad_queries(queries, pad_to_multiple_of).to(self.current_device)
            with self._unwrapped_for_generation(model) as unwrapped:
                generations = unwrapped.generate(**inputs, **generation_kwargs)
            outputs += self._trim(generations, queries, inputs["input_ids"].shape[1], return_prompt, remove_padding)
        return outputs

    def _pad_queries(self, queries: list[torch.Tensor], pad_to_multiple_of: int | None) -> Any:
        padding_side = self.tokenizer.padding_side
        if not self.is_encoder_decoder:
            self.tokenizer.padding_side = "left"  # so that every response starts in the same column
        try:
            inputs: Any = {"input_ids": queries, "attention_mask": [torch.ones_like(query) for query in queries]}
            return self.tokenizer.pad(
                inputs, padding=True, max_length=None, pad_to_multiple_of=pad_to_multiple_of, return_tensors="pt"
            )
        finally:
            self.tokenizer.padding_side = padding_side

    def _trim(
        self,
        generations: torch.Tensor,
        queries: Sequence[torch.Tensor],
        width: int,
        return_prompt: bool,
        remove_padding: bool,
    ) -> list[torch.Tensor]:
        """Each row without its left padding, without the query unless return_prompt, up to its first end of sequence.

        width: columns of the padded queries. With remove_padding, a row is cut after the first end-of-sequence token
        among the generated ones; such a token in the query, or as the decoder's start token, does not count. (In TRL it
        does.)
        """
        generated_from = 1 if self.is_encoder_decoder else width
        ends = [generations.shape[1]] * len(queries)
        if remove_padding and self.tokenizer.eos_token_id is not None:
            is_eos = generations[:, generated_from:] == self.tokenizer.eos_token_id
            padded = torch.nn.functional.pad(is_eos, (0, 1), value=True)  # without one, the row is kept to its end
            ends = (padded.int().argmax(dim=1) + generated_from + 1).tolist()
        starts = [0 if self.is_encoder_decoder else width - len(query) if return_prompt else width for query in queries]
        return [row[start:end] for row, start, end in zip(generations, starts, ends, strict=True)]

    @contextmanager
    def _unwrapped_for_generation(self, model: Any) -> Iterator[Any]:
        """The model itself, in eval mode within the block, with the modes of all its modules restored afterwards."""
        unwrapped = self.accelerator.unwrap_model(model)
        was_training = [module for module in unwrapped.modules() if module.training]
        unwrapped.eval()
        try:
            with self._gathered(model):
                yield unwrapped
        finally:
            for module in was_training:
                module.training = True

    def _gathered(self, model: Any) -> AbstractContextManager[Any]:
        """Under DeepSpeed ZeRO-3 the weights are sharded over the ranks: gathers them once instead of for every token."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or plugin.zero_stage != 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(model.parameters()))
