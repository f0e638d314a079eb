"""Where a generated row ends: at an end id, a stop string, or whatever a stopping criterion has stopped it at."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import StoppingCriteria, StopStringCriteria


def setting(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """What `model.generate(**options)` uses for a field of GenerationConfig; None if nothing sets it."""
    if name in options:
        return options[name]
    for config in (options.get("generation_config"), getattr(model, "generation_config", None)):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def end_ids(*given: Any) -> list[int]:
    """All ids that end a sequence. Each argument is None, an id, or a list or tensor of ids; negative ones, such as TRL's
    eos_token_id=-1 for "never", are no ids."""
    ids: set[int] = set()
    for value in given:
        if value is not None:
            ids.update(torch.as_tensor(value, device="cpu").reshape(-1).tolist())
    return sorted(i for i in ids if i >= 0)


class StopRecorder(StoppingCriteria):
    """Asks criteria for `generate` and keeps each row that they stop, as far as it was written.

    `generate` fills a stopped row with padding up to the longest one, and does not tell where the padding begins: the
    padding's id can be an end id, or a token that the model wrote. The kept rows tell. They are found again by what they
    hold and not by their place in the batch, since beam search and assisted generation change places.

    Args:
        criteria: each is called as by `generate`; all of them are asked at every token.
        sources: number of queries in the batch; the rows of one query are neighbours.
    """

    def __init__(self, criteria: Iterable[StoppingCriteria], sources: int) -> None:
        self.criteria = list(criteria)
        self.sources = sources
        self.stopped: list[list[list[int]]] = [[] for _ in range(sources)]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which of the rows [N, T] are done, bool [N]."""
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            done = done | criterion(input_ids, scores, **kwargs)
        for i in done.nonzero().flatten().tolist():
            source, row = i * self.sources // len(input_ids), input_ids[i].tolist()
            if self.end(source, row) is None:
                self.stopped[source].append(row)
        return done

    def end(self, source: int, row: list[int]) -> int | None:
        """The length at which this row of query number `source` was stopped; None if it was not."""
        lengths = [len(kept) for kept in self.stopped[source] if row[: len(kept)] == kept]
        return min(lengths, default=None)


def record_stops(model: Any, options: dict[str, Any], tokenizer: Any, sources: int) -> StopRecorder | None:
    """Puts a `StopRecorder` into the options of a call of `generate`; None if only end ids and lengths can end a row."""
    stop_strings = setting(model, options, "stop_strings")
    given = list(options.get("stopping_criteria") or [])
    # one of these in the list takes the place of the one that `generate` makes of its options, by its class
    replacing = [criterion for criterion in given if type(criterion).__module__ == StoppingCriteria.__module__]
    criteria = list(given)
    if stop_strings is not None:
        options.setdefault("tokenizer", tokenizer)  # `generate` asks for it
        criteria.append(StopStringCriteria(stop_strings=stop_strings, tokenizer=options["tokenizer"]))
    if not criteria:
        return None
    recorder = StopRecorder(criteria, sources)
    options["stopping_criteria"] = [*replacing, recorder]
    return recorder


def row_ends(rows: torch.Tensor, first: int, ids: list[int], recorder: StopRecorder | None) -> list[int]:
    """The length at which each row [N, T] was stopped: after its first end id from column `first` on, or by a criterion."""
    is_end = torch.isin(rows[:, first:], torch.tensor(ids, dtype=rows.dtype, device=rows.device))
    padded = torch.nn.functional.pad(is_end, (0, 1), value=True)  # without one, the row is kept to its end
    ends = (padded.int().argmax(dim=1) + first + 1).clamp(max=rows.shape[1]).tolist()
    if recorder is None:
        return ends
    stops = [recorder.end(i * recorder.sources // len(rows), row) for i, row in enumerate(rows.tolist())]
    return [end if stop is None else min(end, stop) for end, stop in zip(ends, stops, strict=True)]
