"""What the processes of a step have to agree on, and what they compute over the tokens of all of them."""

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch

from . import step_inputs
from .agreement import agree, gather, gather_values, is_loss_of_a_process
from .base import TrainerBase
from .fingerprint import first_difference, ppo_settings
from .ragged import filled_up, rows_of_step
from .rollout import Rollout
from .sharding import is_sharded
from .step_inputs import Batch

Result = TypeVar("Result")


class ProcessesMixin(TrainerBase):
    """What follows from `PPOConfig.exact_update` for several processes, and their agreement at the start of a step."""

    def _makes_whole_updates(self) -> bool:
        """Whether an update has several parts that shall act as one minibatch of one process."""
        parts = self.accelerator.num_processes * self.config.gradient_accumulation_steps
        return self.config.exact_update and parts > 1

    def _shares_statistics(self) -> bool:
        """Whether moments and statistics are those of the tokens of all processes."""
        return self.config.exact_update and self.is_distributed

    def _token_group(self) -> Any:
        """The processes over whose tokens advantages are whitened; None: this one alone."""
        return torch.distributed.group.WORLD if self._shares_statistics() else None

    def _draw_differently(self) -> None:
        """Each process samples with seeds of its own. numpy's stream, of the order of the minibatches, stays common."""
        if self.is_distributed:
            seed = int(self.config.seed) + self.accelerator.process_index
            random.seed(seed)
            torch.manual_seed(seed)

    def _alike(self, name: str, action: Callable[[], Result]) -> Result:
        """Runs an action on every process; an error of one of them is raised by all, so that none waits for ever."""
        return agree(self.accelerator, name, action)[0]

    @contextlib.contextmanager
    def _raised_by_all(self) -> Iterator[None]:
        """An error within the block on one process is raised by all at its end. One collective.

        Where weights are sharded there is none: forward passes have collectives then, which a process that fails misses.
        """
        if not self.is_distributed or is_sharded(self.accelerator):
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if is_loss_of_a_process(caught):
                raise
            error = caught

        def outcome() -> None:
            if error is not None:
                raise error

        self._alike("step", outcome)

    def _check_together(self, check: Callable[[], Batch]) -> Batch:
        """Checks a batch and fills it up. One collective, by which what is wrong on one process is raised by all.

        A process may sit a step out, with exact_update: all its response_masks are 0. Its samples count nowhere.

        Raises: ValueError if the settings of the processes differ, or if all of them sit out.
        """
        if not self.is_distributed:
            batch = check()
            self._samples = [len(batch[0])]
            return self._filled_up(batch)
        batch, facts = agree(self.accelerator, "step", check, self._facts)
        if len({settings for settings, _ in facts}) > 1:
            self._raise_other_settings()
        self._samples = [samples for _, samples in facts]
        if not any(self._samples):
            step_inputs.fail("response_masks", "leave a token that counts on at least one process", "none")
        return self._filled_up(batch)

    def _filled_up(self, batch: Batch) -> Batch:
        """The batch with as many rows as all processes have; with config.ragged_batches some of them are not of samples."""
        accumulation = int(self.config.gradient_accumulation_steps)
        return filled_up(batch, rows_of_step(max(self._samples), int(self.config.mini_batch_size), accumulation))

    def _own_samples(self) -> int:
        """How many samples of this process count in this step; they are the first rows."""
        return self._samples[self.accelerator.process_index]

    def _facts(self, batch: Batch) -> tuple[int, int]:
        """A number that differs where settings do, and how many samples of this process count."""
        queries, responses, _, masks, _ = batch
        sits_out = self.config.exact_update and masks is not None
        sits_out = sits_out and not step_inputs.any_counts(responses, masks, self.is_encoder_decoder)
        digest = hashlib.blake2b(json.dumps(self._common_settings(), sort_keys=True).encode(), digest_size=8)
        return int.from_bytes(digest.digest(), "big", signed=True), 0 if sits_out else len(queries)

    def _common_settings(self) -> dict[str, Any]:
        """The settings that decide numbers, or which collectives a step has."""
        pushes = bool(self.config.push_to_hub_if_best_kwargs)
        settings = {**ppo_settings(self.config), "compare_steps": int(self.config.compare_steps), "pushes": pushes}
        return {
            **{f"PPOConfig.{name}": value for name, value in settings.items()},
            "rollout_logprobs": self._has_rollout,
        }

    def _mean_score(self, scores: torch.Tensor) -> torch.Tensor:
        """The mean score, 0-d, over the samples of all processes that do not sit out."""
        if not self.is_distributed:
            return scores[: self._own_samples()].mean()
        return self._of_samples(gather(self.accelerator, scores)).mean().to(scores.device)

    def _of_samples(self, rows: torch.Tensor) -> torch.Tensor:
        """[processes, rows, ...] -> [samples, ...], those that count."""
        return torch.cat([own[:samples] for own, samples in zip(rows, self._samples, strict=True)])

    def _raise_other_settings(self) -> NoReturn:
        first, *others = gather_values(self.accelerator, self._common_settings())
        for process, settings in enumerate(others, 1):
            found = first_difference(first, settings)
            if found is not None:
                name, a, b = found
                got = f"{a} on process 0 and {b} on process {process}"
                step_inputs.fail(name, "be the same on all processes", got)
        raise AssertionError("the settings differ")

    def _all_samples(self, rollout: Rollout, data: Mapping[str, Any]) -> dict[str, Any]:
        """What `record_step_stats` takes, of the samples of all processes that do not sit out. One collective.

        Of the queries and responses of other processes only the lengths are known: they are ranges.
        """
        tensors = {"logprobs": rollout.logprobs, "masks": rollout.mask, **data}
        lengths = {"queries": rollout.queries, "responses": rollout.responses}
        columns = [x.reshape(len(rollout.mask), -1).float() for x in tensors.values()]
        columns += [torch.tensor([[len(ids)] for ids in rows], device=self.current_device) for rows in lengths.values()]
        rows = gather(self.accelerator, torch.cat(columns, dim=1))
        active = self._of_samples(rows)
        parts = active.split([column.shape[1] for column in columns], dim=1)
        found: dict[str, Any] = {}
        for (name, x), part in zip(tensors.items(), parts, strict=False):
            found[name] = part.reshape(len(active), *x.shape[1:]).to(x.dtype)
        for name, part in zip(lengths, parts[len(tensors) :], strict=True):
            found[name] = [range(int(length)) for length in part.flatten().tolist()]
        return found
