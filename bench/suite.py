"""What a benchmark case is, and the order that keeps it honest: first check against float64, then time the right."""

import collections.abc
import dataclasses

import torch

from ppo_ext import _native

from . import timing

OURS = "ppo_ext"
OURS_IN_PLACE = "ppo_ext, in place"
FLOOR = "memory floor"
# Relative error (sum of |difference| over sum of |reference|) above which a result is WRONG. Wide enough for an honest
# implementation that computes in the inputs' dtype, far below what a wrong sign, mask or scale gives.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_WORST_FACTOR = 30.0  # the worst single element may be this many tolerances of the largest reference value off


@dataclasses.dataclass(frozen=True)
class Implementation:
    """`run(inputs)` returns the tensors to check. `destroys_logits`: it gets a private copy of the logits. `traffic`:
    the bytes of its own floor, where they differ from the case's."""
    run: collections.abc.Callable
    destroys_logits: bool = False
    traffic: timing.Traffic | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One op in one pass at one shape and dtype. `implementations` maps a name to one, or to why it cannot run."""
    op: str
    pass_name: str
    shape: tuple
    dtype: torch.dtype
    make: collections.abc.Callable       # device -> inputs, a dict of tensors
    reference: collections.abc.Callable  # inputs -> the right tensors in float64
    implementations: dict
    traffic: timing.Traffic | None  # None where no floor says anything
    select: collections.abc.Callable = lambda inputs, outputs: outputs  # what of the outputs is defined, for the check

    @property
    def title(self):
        return f"{self.op} {self.pass_name} {list(self.shape)} {dtype_name(self.dtype)}"

    def rows(self, device, *, seconds=2.0):
        """One row per implementation and one per memory floor, all timed in the same rounds."""
        torch._dynamo.reset()  # else a case would meet the recompilation limit of the cases before it
        torch.manual_seed(0)
        inputs = self.make(device)
        expected = self.select(inputs, self.reference(inputs))
        attempts = {name: self.attempt(implementation, inputs, expected)
                    for name, implementation in self.implementations.items()}
        del expected
        calls = {name: call for name, (call, _, _) in attempts.items() if call is not None}
        traffics = {name: getattr(self.implementations[name], "traffic", None) or self.traffic for name in attempts}
        floors = {_floor_name(traffic): traffic for traffic in traffics.values() if traffic is not None}
        calls |= {name: timing.floor_call(traffic, device) for name, traffic in floors.items()}
        timings = timing.measure(calls, device, seconds=seconds)
        common = {"op": self.op, "pass": self.pass_name, "shape": list(self.shape), "dtype": dtype_name(self.dtype),
                  "backend": backend(device), **timing.stamp(device)}
        rows = [_row(common, name, traffics[name], timings, error, note) for name, (_, error, note) in attempts.items()]
        return rows + [_row(common, name, traffic, timings, None, "") for name, traffic in floors.items()]

    def attempt(self, implementation, inputs, expected):
        """(call to time or None, largest absolute error, note): checks one implementation before anyone times it."""
        if isinstance(implementation, str):
            return None, None, implementation
        if implementation.destroys_logits:
            inputs = {**inputs, "logits": inputs["logits"].clone()}
        try:
            outputs = self.select(inputs, implementation.run(inputs))
        except Exception as error:  # a baseline that cannot run is a row that says why, whatever it raised
            text = str(error).strip() or "no message"
            return None, None, f"{type(error).__name__}: {text.splitlines()[0][:160]}"
        relative, absolute = compare(outputs, expected)
        if not relative <= TOLERANCE[self.dtype]:
            return None, absolute, f"WRONG: relative error {relative:.2g} against float64, not timed"
        return lambda: implementation.run(inputs), absolute, ""


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


def compare(results, expected):
    """(relative error, largest absolute error) of the worst tensor; infinite where a value or a shape is unusable."""
    relative = absolute = 0.0
    if len(results) != len(expected):
        return float("inf"), float("inf")
    for result, reference in zip(results, expected):
        if result.shape != reference.shape or not torch.isfinite(result).all():
            return float("inf"), float("inf")
        difference = (result.detach().double() - reference).abs_()
        worst, size = difference.amax().item(), reference.abs()
        relative = max(relative, difference.sum().item() / max(size.sum().item(), 1e-30),
                       worst / (_WORST_FACTOR * max(size.amax().item(), 1e-30)))
        absolute = max(absolute, worst)
    return relative, absolute


def _floor_name(traffic):
    return f"{FLOOR}, in place" if traffic.update else FLOOR


def _row(common, name, traffic, timings, error, note):
    row = {**common, "implementation": name, "error": error, "note": note}
    if name in timings:
        row |= dataclasses.asdict(timings[name])
    if name in timings and traffic is not None:
        row |= {"bytes": traffic.bytes, "gb_per_s": traffic.bytes / timings[name].p50_ms / 1e6,
                "share_of_floor": timings[_floor_name(traffic)].p50_ms / timings[name].p50_ms}
    return row
