"""The only clock of the benchmarks: interleaved rounds, medians with their spread, cold and warm caches, the memory
floor.

Implementations take turns within each round, so that a change of the machine (clock rate, other processes, heat)
affects all of them alike. All numbers of one table come from the same run.
"""

import collections
import contextlib
import dataclasses
import gc
import pathlib
import statistics
import time

import torch

_SLOW_MS = 100.0  # a call of this length needs no second warm-up
_SHORTEST_SAMPLE_MS = (
    5.0  # shorter calls are repeated until a sample takes this long, as calls in a running program are
)
_DISTURBED = 1.15  # the spread of samples is smaller on a quiet machine
_SHORT_SECONDS = 3.0  # measurements up to this length are repeated if they were disturbed
_DEFAULT_CACHE_BYTES = 64 << 20  # if the system does not say how large the cache is


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, 20th and 80th percentile over the rounds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a call is timed. `cache`: "cold", after the last-level cache was overwritten, or "warm", right after another
    call. `mode`: "eager"; "graph", the replay of a CUDA graph, without work of the host; or "host", until the call
    returns, which on CUDA is when its kernels are queued."""

    cache: str = "warm"
    mode: str = "eager"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes that an ideal implementation moves: only `read`, `copy` into new memory, or `update` in place."""

    read: int = 0
    copy: int = 0
    update: int = 0

    @property
    def bytes(self):
        return self.read + 2 * self.copy + 2 * self.update


# ---- one sample -----------------------------------------------------------------------------------------------------


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_ms(call, repeats, device):
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    elapsed = time.perf_counter() - start
    _synchronize(device)
    del result  # freeing a large result is not part of the call
    return elapsed * 1e3 / repeats


def _events_ms(call, device, wait):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if wait:
        torch.cuda.synchronize(
            device
        )  # else the call would be queued while the caches are still being flushed, and its host time hidden
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def cache_bytes(device):
    """The size of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [_DEFAULT_CACHE_BYTES]
    with contextlib.suppress(OSError, ValueError):
        files = pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in files] or sizes
    return max(sizes)


def flusher(device):
    """A function that writes through twice the last-level cache."""
    buffer = torch.zeros(2 * cache_bytes(device), dtype=torch.int8, device=device)
    return lambda: buffer.add_(1)


def captured(call, device, pool):
    """`call` as the replay of a CUDA graph. All graphs of one `pool` share memory, as their results are never read."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()  # what a first call sets up cannot be captured
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph.replay


# ---- interleaved rounds ---------------------------------------------------------------------------------------------


def _sampler(calls, device, setting):
    """Warms up every implementation; returns a function from its name to one sample in milliseconds."""
    first_ms = {}
    for name, call in calls.items():
        first_ms[name] = _host_ms(call, 1, device)
        if (
            first_ms[name] < _SLOW_MS
        ):  # the first call of a fast implementation takes much longer than the following ones
            first_ms[name] = _host_ms(call, 1, device)
    flush = flusher(device) if setting.cache == "cold" else lambda: None

    def repeated(name):
        return _host_ms(calls[name], max(1, int(_SHORTEST_SAMPLE_MS / first_ms[name])), device)

    def once(name):
        flush()
        if device.type == "cuda":
            return _events_ms(calls[name], device, wait=setting.mode == "eager")
        return _host_ms(calls[name], 1, device)

    on_host = setting.mode == "host" or device.type == "cpu"
    return repeated if on_host and setting.cache == "warm" else once


def measure(calls, device, *, setting=Setting(), seconds=2.0, min_rounds=5, max_rounds=400):  # noqa: B008 (frozen)
    """Times each of `calls` (name -> function without arguments) for about `seconds`; returns name -> Timing.

    A short measurement may be disturbed by other work on the machine as a whole. If the samples are spread so far that
    it was, it is repeated for all implementations, and the run with the smaller spread counts.
    """
    sample = _sampler(calls, device, setting)
    start = time.perf_counter()
    timings = _rounds(calls, sample, seconds, min_rounds, max_rounds)
    if _spread(timings) > _DISTURBED and time.perf_counter() - start < _SHORT_SECONDS:
        timings = min(timings, _rounds(calls, sample, seconds, min_rounds, max_rounds), key=_spread)
    return timings


def _spread(timings):
    """The ratio of the 80th to the 20th percentile of the samples; the median of all implementations."""
    return statistics.median(timing.p80_ms / timing.p20_ms for timing in timings.values()) if timings else 1.0


def _rounds(calls, sample, seconds, min_rounds, max_rounds):
    samples = {name: [] for name in calls}
    order = list(calls)
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds * len(order)
        for done in range(max_rounds):
            if done >= min_rounds and time.perf_counter() > deadline:
                break
            for name in order:
                samples[name].append(sample(name))
            order = order[1:] + order[:1]  # so that no implementation always runs after the same one
    finally:
        gc.enable()
    return {name: summary(ms) for name, ms in samples.items()}


def summary(ms):
    ordered = sorted(ms)
    last = len(ordered) - 1
    p20, p50, p80 = (ordered[round(q * last)] for q in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, len(ordered))


def floor_call(traffic, device):
    """A function that moves the bytes of `traffic` with torch's own sum, clone and in-place multiply: the memory
    floor."""

    def buffer(size):
        return torch.ones(max(1, size // 4), dtype=torch.float32, device=device) if size else None

    read, copy, update = buffer(traffic.read), buffer(traffic.copy), buffer(traffic.update)

    def move():
        if read is not None:
            read.sum()
        if update is not None:
            update.mul_(1.0)
        return copy.clone() if copy is not None else None

    return move


class Parts:
    """Milliseconds of the named parts of one call. A part may occur several times; parts must not overlap."""

    def __init__(self, device):
        self.ms = collections.defaultdict(float)
        self._device, self._begun = device, {}

    def _now(self):
        _synchronize(self._device)
        return time.perf_counter() * 1e3

    def begin(self, name):
        self._begun[name] = self._now()

    def end(self, name):
        self.ms[name] += self._now() - self._begun.pop(name)
