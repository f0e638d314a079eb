"""Sampling responses from the policy and the reference, in TRL's batches, each row up to where it was stopped."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..models.modes import evaluating
from . import generation_inputs, stopping
from .base import TrainerBase
from .padding import check_padding_id, hidden_in_generation, input_side, padding_side
from .sharding import gathered
from .step_inputs import check_ids, token_ids


class GenerationMixin(TrainerBase):
    """`PPOTrainer.generate` and what it needs."""

    def generate(
        self,
        query_tensor: torch.Tensor | Sequence[torch.Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to each query.

        Args:
            query_tensor: a list of 1-D tensors of token ids, or one 1-D tensor.
            length_sampler: called once per batch for max_new_tokens.
            batch_size: number of queries that are generated together; for a list only.
            return_prompt: keep the query in front of the response (decoder-only models).
            generate_ref_response: also sample from the reference model.
            generation_kwargs: handed to the model's `generate`; for a list also `remove_padding` (default True: each
                row ends where it was stopped, see `_trim`) and `pad_to_multiple_of`.

        Returns: a list of 1-D tensors for a list, a tensor [1, length] for a tensor; a pair of these with
        generate_ref_response. With num_return_sequences, for a list only, the responses to one query follow one another.
        With return_dict_in_generate, too, only the sequences are returned.

        The models are in eval mode meanwhile, since `step` computes the log-probabilities of the responses without
        dropout. (TRL samples with dropout from the second step on.) As in `step`, all ids of a query count: padding in
        it is not masked, and one warning tells how to strip it.

        Raises: ValueError or TypeError that names the argument; also for queries that with their new tokens are longer
        than the model can read.

        Source: TRL 0.11.4, `PPOTrainer.generate`.
        """
        generation_inputs.check_options(
            query_tensor, batch_size, self.accelerator.unwrap_model(self.model).pretrained_model, generation_kwargs
        )
        one = isinstance(query_tensor, torch.Tensor)
        queries = self._checked_queries([query_tensor] if one else [*query_tensor])
        options = {"length_sampler": length_sampler, "return_prompt": return_prompt, **generation_kwargs}

        def sample(model: Any) -> Any:
            if one:
                return self._generate_one(model, queries[0], **options)
            return self._generate_batched(model, queries, batch_size=batch_size, **options)

        response = sample(self.model)
        if not generate_ref_response:
            return response
        with self.optional_peft_ctx():
            ref_model = self.model if self.ref_model is None else self.ref_model
            return response, sample(ref_model)

    def _checked_queries(self, queries: Sequence[Any]) -> list[torch.Tensor]:
        """Queries as int64 tensors on the device; ValueError or TypeError for what the models cannot read."""
        where = "PPOTrainer.generate"
        checked = token_ids("query_tensor", queries, self.current_device, where)
        if checked:
            check_ids(self._limits, where, query_tensor=checked)
            self._padding_watch.warn(where, *self._padding_watch.count(checked).tolist())
        return checked

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
        # without a mask `generate` would not attend to a padding id in the query, while `step` does
        mask = generation_kwargs.pop("attention_mask", torch.ones_like(query).unsqueeze(0))
        inputs = {"input_ids": query.unsqueeze(0), "attention_mask": mask}
        response, _ = self._sample(model, [query], inputs, generation_kwargs)
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
            batch = query_tensors[start : start + batch_size]
            responses: dict[int, list[torch.Tensor]] = {}
            for rows in self._padded_together(model, batch):
                queries = [batch[row] for row in rows]
                inputs = self._pad_queries(queries, pad_to_multiple_of).to(self.current_device)
                generations, stops = self._sample(model, queries, inputs, generation_kwargs)
                width = inputs["input_ids"].shape[1]
                trimmed = self._trim(generations, queries, width, return_prompt, stops if remove_padding else None)
                each = len(trimmed) // len(rows)  # num_return_sequences
                responses.update({row: trimmed[i * each : (i + 1) * each] for i, row in enumerate(rows)})
            outputs += [response for row in range(len(batch)) for response in responses[row]]
        return outputs

    def _padded_together(self, model: Any, queries: Sequence[torch.Tensor]) -> list[list[int]]:
        """Indices of queries that one call of `generate` gets: all, or those of one length if padding would change them."""
        if self.is_encoder_decoder or (self._left_padding_is_harmless and self._generation_hides_padding(model)):
            return [list(range(len(queries)))]
        groups: dict[int, list[int]] = {}
        for row, query in enumerate(queries):
            groups.setdefault(len(query), []).append(row)
        return list(groups.values())

    def _generation_hides_padding(self, model: Any) -> bool:
        # by all processes alike, whatever their queries, as weights may be gathered
        if self._hidden_in_generation is None:
            with self._unwrapped_for_generation(model) as unwrapped:
                self._hidden_in_generation = hidden_in_generation(
                    unwrapped.pretrained_model, self.tokenizer.pad_token_id
                )
        return self._hidden_in_generation

    def _pad_queries(self, queries: list[torch.Tensor], pad_to_multiple_of: int | None) -> Any:
        # `generate` itself fills up rows of one length, too, as soon as one of them has ended
        lengths = [0, *map(len, queries)] if len(queries) > 1 else []
        check_padding_id("PPOTrainer.generate", self.tokenizer, self._limits, lengths)
        side = input_side(self.tokenizer, self._left_padding_is_harmless)
        if not self.is_encoder_decoder:  # on the left, so that every response starts in the same column
            side = "left"
            pad_to_multiple_of = pad_to_multiple_of if self._left_padding_is_harmless else None
        with padding_side(self.tokenizer, side):
            inputs: Any = {"input_ids": queries, "attention_mask": [torch.ones_like(query) for query in queries]}
            return self.tokenizer.pad(
                inputs, padding=True, max_length=None, pad_to_multiple_of=pad_to_multiple_of, return_tensors="pt"
            )

    def _sample(
        self, model: Any, queries: Sequence[torch.Tensor], inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, list[int]]:
        """The rows [N, T] of one call of `generate`, and the length at which each was stopped."""
        options = dict(options)
        with self._unwrapped_for_generation(model) as unwrapped:
            pretrained_model = unwrapped.pretrained_model
            generation_inputs.check_new_tokens(queries, pretrained_model, self._limits, options)
            recorder = stopping.record_stops(pretrained_model, options, self.tokenizer, len(queries))
            output = unwrapped.generate(**inputs, **options)
        rows = getattr(output, "sequences", output)
        first = 1 if self.is_encoder_decoder else inputs["input_ids"].shape[1]
        ids = stopping.end_ids(self.tokenizer.eos_token_id, stopping.setting(pretrained_model, options, "eos_token_id"))
        return rows, stopping.row_ends(rows, first, ids, recorder)

    def _trim(
        self,
        generations: torch.Tensor,
        queries: Sequence[torch.Tensor],
        width: int,
        return_prompt: bool,
        ends: Sequence[int] | None,
    ) -> list[torch.Tensor]:
        """Each row without its left padding, without the query unless return_prompt, up to its end.

        width: columns of the padded queries. ends: the length at which each row was stopped; None keeps what follows. A
        row ends after its first end id among the generated tokens, whether the tokenizer, the generation config or a
        keyword calls it one, or after the token at which a stop string or a stopping criterion stopped it. An end id in
        the query, or as the decoder's start token, does not count. (In TRL it does, and only the tokenizer's id ends a row.)
        """
        each = len(generations) // len(queries)
        trimmed = []
        for i, row in enumerate(generations):
            start = 0 if self.is_encoder_decoder else width
            if return_prompt and not self.is_encoder_decoder:
                start = width - len(queries[i // each])
            trimmed.append(row[start : None if ends is None else ends[i]])
        return trimmed

    @contextmanager
    def _unwrapped_for_generation(self, model: Any) -> Iterator[Any]:
        """The model itself, in eval mode within the block, with the modes of all its modules restored afterwards."""
        unwrapped = self.accelerator.unwrap_model(model)
        with evaluating(unwrapped), self._gathered(model):
            yield unwrapped

    def _gathered(self, model: Any) -> AbstractContextManager[Any]:
        """Under FSDP and DeepSpeed ZeRO-3 the weights are sharded: gathers them once instead of for every token."""
        if self.accelerator.distributed_type == "FSDP":
            return gathered(model)
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is None or plugin.zero_stage != 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(model.parameters()))
