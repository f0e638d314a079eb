"""What a benchmark case is, and the order that keeps it honest: first check against float64, then time the right."""

import collections.abc
import dataclasses
import math

import torch

from ppo_ext.ops import _native

from . import machine, timing
from .timing import Setting

OURS = "ppo_ext"
OURS_IN_PLACE = "ppo_ext, in place"
FLOOR = "memory floor"
PRODUCTS = "matrix products"  # the floor of what is bound by them
# Relative error (sum of |difference| over sum of |reference|) above which a result is WRONG. Wide enough for an honest
# implementation that computes in the inputs' dtype, far below what a wrong sign, mask or scale gives.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_ENTRIES_AT_ONCE = 1 << 18
_WORST_FACTOR = 30.0  # the worst single element may be this many tolerances of the largest reference value off


@dataclasses.dataclass(frozen=True)
class Implementation:
    """`run(inputs)` returns the tensors to check. `prepare(inputs)`: what to do before, outside the clock; it returns
    the inputs of `run`. `destroys_logits`: it gets a private copy of the logits. `traffic`: the bytes of its own floor,
    where they differ from the case's. `partial`: it returns the first of the results only."""

    run: collections.abc.Callable
    destroys_logits: bool = False
    traffic: timing.Traffic | None = None
    prepare: collections.abc.Callable = lambda inputs: inputs
    partial: bool = False
    compiled: bool = False
    version: str = ""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What the check of an implementation gave: a call to time or None, its largest absolute error, and why not."""

    call: collections.abc.Callable | None
    error: float | None
    note: str


@dataclasses.dataclass(frozen=True)
class Case:
    """One op in one pass at one shape and dtype. `implementations` maps a name to one, or to why it cannot run."""

    op: str
    pass_name: str
    shape: tuple
    dtype: torch.dtype
    make: collections.abc.Callable  # device -> inputs, a dict of tensors
    reference: collections.abc.Callable  # inputs -> the right tensors in float64
    implementations: dict
    traffic: timing.Traffic | None  # None where no floor of memory says anything
    products: collections.abc.Callable | None = None  # inputs -> a call that does the matrix products alone
    select: collections.abc.Callable = lambda inputs, outputs: outputs  # what of the outputs is defined, for the check
    kind: str = "speed"  # speed, overhead, or sweep over what
    buffer_bytes: int | None = None  # the unit of peak memory; None: it is not taken
    capturable: bool = False  # whether a CUDA graph can hold it
    featured: bool = False  # in docs/performance.md though too slow for the selection

    @property
    def title(self):
        name = f"{self.op} {self.pass_name} {list(self.shape)} {dtype_name(self.dtype)}"
        return name if self.kind == "speed" else f"{self.kind}: {name}"

    def rows(self, device, *, seconds=2.0):
        """One row per implementation and one per memory floor, in each setting; a setting's are timed in the same rounds."""
        torch._dynamo.reset()  # else a case would meet the recompilation limit of the cases before it
        torch.manual_seed(0)
        inputs = self.make(device)
        expected = self.select(inputs, self.reference(inputs))
        attempts = {
            name: self.attempt(implementation, inputs, expected)
            for name, implementation in self.implementations.items()
        }
        del expected
        if self.products:
            attempts[PRODUCTS] = Attempt(self.products(inputs), None, "")
        common = {
            "kind": self.kind,
            "op": self.op,
            "pass": self.pass_name,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "backend": backend(device),
            **machine.stamp(device),
        }
        first, *others = self.settings(device)
        rows = [{**common, **row, "shown": True} for row in self._timed(attempts, device, first, seconds)]
        if self.buffer_bytes:
            for row in rows:
                self._add_memory(row, attempts.get(row["implementation"]), device)
        for setting in others:
            right = {name: attempt for name, attempt in attempts.items() if attempt.call}
            rows += [{**common, **row, "shown": False} for row in self._timed(right, device, setting, seconds)]
        right = [name for name, attempt in attempts.items() if attempt.call and name != PRODUCTS]
        return rows + [{**common, **row} for row in self.more_rows(inputs, right, device)]

    def more_rows(self, inputs, names, device):
        """What a kind of case measures beside whole calls of these implementations, which were found right."""
        return ()

    def settings(self, device):
        """In which settings the case is timed; the first is the one that tables show."""
        if self.kind == "overhead":
            return [Setting("warm", "host")]
        if device.type == "cuda":
            return [Setting("cold", "eager"), *[Setting("cold", "graph")] * self.capturable]
        cached = self.traffic is not None and self.traffic.bytes < timing.cache_bytes(device)  # else it is always cold
        return [Setting("warm", "eager"), *[Setting("cold", "eager")] * (cached and self.kind == "speed")]

    def attempt(self, implementation, inputs, expected):
        """Checks one implementation before anyone times it."""
        if isinstance(implementation, str):
            return Attempt(None, None, implementation)
        if implementation.destroys_logits:
            inputs = {**inputs, "logits": inputs["logits"].clone()}
        try:
            inputs = implementation.prepare(inputs)
            outputs = self.select(inputs, implementation.run(inputs))
        except Exception as error:  # a baseline that cannot run is a row that says why, whatever it raised
            return Attempt(None, None, first_line(error))
        if implementation.partial:
            expected = expected[: len(outputs)]
        relative, absolute = compare(outputs, expected)
        if not relative <= TOLERANCE[self.dtype]:
            return Attempt(None, absolute, f"WRONG: relative error {relative:.2g} against float64, not timed")
        return Attempt(lambda: implementation.run(inputs), absolute, "")

    def _timed(self, attempts, device, setting, seconds):
        """The rows of one setting."""
        calls = {name: attempt.call for name, attempt in attempts.items() if attempt.call}
        traffics = {name: getattr(self.implementations.get(name), "traffic", None) or self.traffic for name in attempts}
        floors = {_floor_name(traffic): traffic for traffic in traffics.values() if traffic is not None}
        calls |= {name: timing.floor_call(traffic, device) for name, traffic in floors.items()}
        notes = {name: attempt.note for name, attempt in attempts.items()}
        if setting.mode == "graph":
            calls, failed = _captured(calls, device)
            notes |= failed
        timings = timing.measure(calls, device, setting=setting, seconds=seconds)
        for name, traffic in {**traffics, **floors}.items():
            attempt = attempts.get(name)
            yield {
                "implementation": name,
                "version": getattr(self.implementations.get(name), "version", ""),
                **dataclasses.asdict(setting),
                "error": attempt.error if attempt else None,
                "note": notes.get(name, ""),
                **_times(name, traffic, timings),
            }

    def _add_memory(self, row, attempt, device):
        if attempt is None or attempt.call is None:
            return
        try:
            row["peak_bytes"] = machine.peak_extra_bytes(attempt.call, device)
            row["peak_buffers"] = row["peak_bytes"] / self.buffer_bytes
        except OSError as error:
            row["note"] = f"the peak cannot be read here: {error}"


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def backend(device):
    """'native' where the compiled ops answer, else 'reference'."""
    return "native" if _native.status().get(device.type) == "loaded" else "reference"


def compiled(function):
    """`function` through torch.compile, with every shape a constant: the setting in which Inductor is fastest."""
    return torch.compile(function, dynamic=False)


def in_float64(inputs):
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def first_line(error):
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


def compare(results, expected):
    """(relative error, largest absolute error) of the worst tensor; infinite where a value or a shape is unusable."""
    relative = absolute = 0.0
    if len(results) != len(expected):
        return float("inf"), float("inf")
    for result, reference in zip(results, expected):
        if result.shape != reference.shape:
            return float("inf"), float("inf")
        total, worst, size, largest = _sums(result.detach().flatten(), reference.flatten())
        if not math.isfinite(total):
            return float("inf"), float("inf")
        relative = max(relative, total / max(size, 1e-30), worst / (_WORST_FACTOR * max(largest, 1e-30)))
        absolute = max(absolute, worst)
    return relative, absolute


def _sums(result, reference):
    """Sum and maximum of |result - reference|, and of |reference|; some entries at a time, which stay in the cache."""
    sums, largest = [0.0, 0.0], [0.0, 0.0]
    for some, right in zip(result.split(_ENTRIES_AT_ONCE), reference.split(_ENTRIES_AT_ONCE)):
        for i, x in enumerate(((some.double() - right).abs_(), right.abs())):
            sums[i] += x.sum().item()
            largest[i] = max(largest[i], x.amax().item())
    return sums[0], largest[0], sums[1], largest[1]


def _captured(calls, device):
    """(the calls as replays of CUDA graphs, why others cannot be)."""
    pool, replays, failed = torch.cuda.graph_pool_handle(), {}, {}
    for name, call in calls.items():
        try:
            replays[name] = timing.captured(call, device, pool)
        except Exception as error:  # a host sync, an allocation of the wrong kind: the row says which
            failed[name] = f"no CUDA graph holds it: {first_line(error)}"
    return replays, failed


def _floor_name(traffic):
    return f"{FLOOR}, in place" if traffic.update else FLOOR


def _times(name, traffic, timings):
    if name not in timings:
        return {}
    times = dataclasses.asdict(timings[name])
    if traffic is None:
        floor = timings.get(PRODUCTS)
        return times | ({"share_of_floor": floor.p50_ms / timings[name].p50_ms} if floor else {})
    return {
        **times,
        "bytes": traffic.bytes,
        "gb_per_s": traffic.bytes / timings[name].p50_ms / 1e6,
        "share_of_floor": timings[_floor_name(traffic)].p50_ms / timings[name].p50_ms,
    }
