"""The only clock of the suite: interleaved rounds, medians with their spread, the memory floor, peak memory, the stamp.

Competitors take turns within each round, so that a drift of the machine (clock, neighbours, heat) hits all of them
alike. Every number of one table comes from one such run.
"""

import collections
import contextlib
import ctypes
import dataclasses
import datetime
import gc
import os
import pathlib
import platform
import subprocess
import time

import torch

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_SLOW_MS = 100.0  # a call of this length needs no second warm-up
_SHORTEST_SAMPLE_MS = 5.0  # faster calls are repeated until one sample lasts this long, as they are in a running program


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, 20th and 80th percentile over the rounds."""
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that an ideal implementation moves: `read` only, `copy` into fresh memory, `update` in place."""
    read: int = 0
    copy: int = 0
    update: int = 0

    @property
    def bytes(self):
        return self.read + 2 * self.copy + 2 * self.update


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample_cpu(call, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    elapsed = time.perf_counter() - start
    del result  # freeing a large result is not part of the call
    return elapsed * 1e3 / repeats


def _sample_cuda(call, flush):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()  # evicts the inputs from L2
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _sampler(calls, device):
    """A function from a competitor's name to one sample in milliseconds; warms every competitor up."""
    first_ms = {}
    for name, call in calls.items():
        first_ms[name] = _sample_cpu(call, 1)
        if first_ms[name] < _SLOW_MS:  # the first call of a fast one is far from the rule
            first_ms[name] = _sample_cpu(call, 1)
        _synchronize(device)
    if device.type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)
        return lambda name: _sample_cuda(calls[name], flush)
    repeats = {name: max(1, int(_SHORTEST_SAMPLE_MS / ms)) for name, ms in first_ms.items()}
    return lambda name: _sample_cpu(calls[name], repeats[name])


def measure(calls, device, *, seconds=2.0, min_rounds=5, max_rounds=400):
    """Times each of `calls` (name -> function without arguments) for about `seconds`; returns name -> Timing."""
    sample = _sampler(calls, device)
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
            order = order[1:] + order[:1]  # nobody runs always after the same neighbour
    finally:
        gc.enable()
    return {name: summary(ms) for name, ms in samples.items()}


def summary(ms):
    ordered = sorted(ms)
    last = len(ordered) - 1
    p20, p50, p80 = (ordered[round(q * last)] for q in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, len(ordered))


def floor_call(traffic, device):
    """A function that moves `traffic` with torch's own sum, clone and in-place multiply: the floor of this machine."""
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
    """Milliseconds that the named parts of one call took. A part may come several times, and lie within no other."""

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


def peak_extra_bytes(call, device):
    """Peak memory during `call` above what was held before it. CPU: resident set, so temporaries of any kind count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: else the call may fill freed pages that are still resident
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
    before = _status_bytes("VmRSS")
    result = call()
    del result
    return _status_bytes("VmHWM") - before


def _status_bytes(field):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"peak_extra_bytes: /proc/self/status must have {field}, got none")


def stamp(device):
    """Where and when a row was measured."""
    return {"device": _device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "commit": _commit(), "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def _device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def _commit():
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PPO_EXT_COMMIT", "unknown")  # for a copy of the checkout without its history
