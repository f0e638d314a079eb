"""The error of each op against float64, beside the errors of torch in float32 and of TRL 0.11.4: `python -m
bench.accuracy`.

Every figure is an absolute error against `ppo_ext.ops.reference` in float64 on the same inputs, after they were rounded
to their dtype: the largest and the mean over the entries of a result. "torch" is the reference in float32, "TRL" TRL's
functions on float32 copies of the inputs, which is what TRL's models return. Ours is measured with the CPU kernels of
each instruction set that this machine has.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import subprocess
import sys

import torch
import tqdm

import ppo_ext
from ppo_ext.info import report
from ppo_ext.ops import reference
from tests.ops import OPS, STATS

from . import accuracy_pages, machine
from .accuracy_pages import TORCH
from .cases import token_inputs
from .passes import BOTH, FORWARD
from .peers import trl_classic
from .suite import in_float64
from .trl_baseline import NAME

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (2, 7, 1000, 32000, 50257, 128256, 151936)
SCALES, OFFSETS = (1.0, 3.0, 30.0), (0.0, 1e4)
# (scale, reference's scale, offset, reference's offset) of logits and reference logits that differ in magnitude, and
# those of them that float16 can hold
DIFFERENCES = (
    (1e3, 1.0, 0.0, 0.0),
    (1.0, 1e3, 0.0, 0.0),
    (1.0, 1.0, 1e4, -1e4),
    (1e5, 1.0, 0.0, 0.0),
    (1e5, 1e3, 0.0, 0.0),
    (1e-3, 1e5, 0.0, 0.0),
    (1e20, 1.0, 0.0, 0.0),
    (1.0, 1.0, -3e7, 0.0),
    (1.0, 1.0, 0.0, -3e7),
    (1.0, 1.0, 3e7, -3e7),
)
DIFFERENCES_OF = {torch.float32: DIFFERENCES, torch.bfloat16: DIFFERENCES, torch.float16: DIFFERENCES[:3]}
_ROWS, _TOKENS, _HIDDEN = 4, (16, 257), 16
_MOST_OF_HIDDEN = (
    50257  # the largest vocabulary of the ops on hidden states, whose gradients have _HIDDEN times its size
)
_LEVELS = {
    "x86-64-v4": ("4", "3", "1"),
    "x86-64-v3": ("3", "1"),
}  # the values of PPO_EXT_CPU_LEVEL for a machine's best level and those below it


# ---- inputs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Input:
    """All but op and dtype are None for the ops on per-token tensors, and the reference's for those without one."""

    op: str
    dtype: torch.dtype
    vocabulary: int | None = None
    scale: float | None = None
    offset: float | None = None
    ref_scale: float | None = None
    ref_offset: float | None = None

    @property
    def key(self):
        return {
            "op": self.op,
            "dtype": str(self.dtype).removeprefix("torch."),
            "V": self.vocabulary,
            "scale": self.scale,
            "offset": self.offset,
            "ref_scale": self.ref_scale,
            "ref_offset": self.ref_offset,
        }

    def tensors(self):
        torch.manual_seed(0)
        if self.vocabulary is None:
            inputs = token_inputs(_TOKENS) | {"incoming": torch.randn(_TOKENS)}
            return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        if OPS[self.op].on_hidden:  # a logit is a sum of _HIDDEN terms
            hidden, weight = torch.randn(_ROWS, _HIDDEN), torch.randn(self.vocabulary, _HIDDEN)
            return {
                "hidden": (self.scale / _HIDDEN**0.5 * hidden).to(self.dtype),
                "weight": weight.to(self.dtype),
                "labels": torch.randint(self.vocabulary, (_ROWS,)),
                "grad_logprobs": torch.randn(_ROWS),
                "grad_entropy": torch.randn(_ROWS),
            }
        shape = _ROWS, self.vocabulary
        logits = torch.randn(shape)
        ref_logits = logits + 0.1 * torch.randn(shape)
        if self.ref_scale is None:
            tensors = {}
        else:
            tensors = {"ref_logits": (self.ref_scale * ref_logits + self.ref_offset).to(self.dtype)}
        return tensors | {
            "logits": (self.scale * logits + self.offset).to(self.dtype),
            "labels": torch.randint(self.vocabulary, shape[:1]),
            "grad_logprobs": torch.randn(_ROWS),
            "grad_entropy": torch.randn(_ROWS),
        }

    def inputs(self):
        """The tensors and, for the ops that take the rollout too, that of _ROWS tokens. The old log-probabilities are
        near the present ones, as in the epochs of a PPO step."""
        tensors = self.tensors()
        if "old_logprobs" not in OPS[self.op].arguments or self.vocabulary is None:
            return tensors
        exact = in_float64(tensors)
        logits = exact["logits"] if "logits" in exact else exact["hidden"] @ exact["weight"].T
        tokens = {name: x[0] for name, x in token_inputs((1, _ROWS)).items() if x.dim() == 2}
        tokens["old_logprobs"] = reference.logprobs(logits, exact["labels"]).float() + 0.3 * torch.randn(_ROWS)
        return tensors | tokens | {"mask": torch.ones(_ROWS, dtype=torch.bool)}


def all_inputs(vocabularies=VOCABULARIES, names=tuple(OPS)):
    """The inputs of the ops of these names: first for those on logits, then for those on per-token tensors."""
    on_logits = [name for name in names if OPS[name].on_logits]
    on_hidden = [name for name in names if OPS[name].on_hidden]
    others = [name for name in names if not OPS[name].has_vocabulary]
    fewer = [vocabulary for vocabulary in vocabularies if vocabulary <= _MOST_OF_HIDDEN]
    return [
        *(input for name in on_logits for input in _inputs_on_logits(name, vocabularies)),
        *(Input(*chosen) for chosen in itertools.product(on_hidden, DTYPES, fewer, SCALES, OFFSETS[:1])),
        *(Input(*chosen) for chosen in itertools.product(others, DTYPES)),
    ]


def _inputs_on_logits(name, vocabularies):
    with_reference = "ref_logits" in OPS[name].arguments
    for dtype, V, scale, offset in itertools.product(DTYPES, vocabularies, SCALES, OFFSETS):
        yield Input(name, dtype, V, scale, offset, *((scale, offset) if with_reference else ()))
    for dtype, V in itertools.product(DTYPES if with_reference else (), vocabularies):
        for scale, ref_scale, offset, ref_offset in DIFFERENCES_OF[dtype]:
            yield Input(name, dtype, V, scale, offset, ref_scale, ref_offset)


# ---- errors ---------------------------------------------------------------------------------------------------------


def _benchmark(name):
    """How the benchmarks call this op."""
    return importlib.import_module(f".bench_{OPS[name].stem}", __package__).OPS[name]


def _results(name, tensors, function):
    """{name: result} of a function that computes the op, gradients first. Masked entries are replaced by 0, as TRL
    fills them in."""
    op, benchmark = OPS[name], _benchmark(name)
    names = [f"grad {leaf}" for leaf in op.differentiable[: len(benchmark.leaves)]]
    names += [result for result, kind in op.results.items() if kind is not STATS]
    results = benchmark.results(BOTH if benchmark.leaves else FORWARD, tensors, function)
    if "mask" in tensors:
        mask = tensors["mask"] != 0
        results = [torch.where(mask, x, 0.0) if x.shape == mask.shape else x for x in results]
    return {name: x.detach() for name, x in zip(names, results)}


def _error(result, exact):
    """[largest, mean] absolute error; infinite if a result is NaN where the exact one is not. What is less than float64
    itself resolves is 0: where a gradient is the difference of two terms of order one, the exact one is no better."""
    error = (result.double() - exact).abs().nan_to_num(nan=float("inf"))
    error[error < torch.finfo(torch.float64).eps * exact.abs().max().clamp(min=1.0)] = 0.0
    return [_short(error.max().item()), _short(error.mean().item())]


def _short(error):
    return float(f"{error:.4g}")


def _trl_functions():
    """{op: TRL's function, called on float32 copies of its inputs}."""

    def on_copies(function):
        return lambda *inputs, **named: function(
            *map(_single, inputs), **{name: _single(x) for name, x in named.items()}
        )

    offers = trl_classic.PEER.load(torch.device("cpu"))
    return {op: on_copies(offers[op][NAME].function) for op in OPS if op in offers}


def _single(x):
    return x.float() if x.is_floating_point() else x


def measure(inputs, others=False, progress=True):
    """One row for each result of an op on each of `inputs`: our error at the level of this process and, if `others`,
    those of torch and TRL."""
    found = []
    trl = _trl_functions() if others else {}
    for input in tqdm.tqdm(inputs, unit="input", disable=not progress, file=sys.stderr):
        tensors = input.inputs()
        ours, exactly = (_benchmark(input.op).of(library, input.op) for library in (ppo_ext, reference))
        exact = _results(input.op, in_float64(tensors), exactly)
        candidates = {report.cpu_level(): ours} | ({TORCH: exactly} if others else {})
        candidates |= {NAME: trl[input.op]} if input.op in trl else {}
        results = {who: _results(input.op, tensors, function) for who, function in candidates.items()}
        for name, right in exact.items():
            unit = torch.finfo(results[report.cpu_level()][name].dtype).eps * right.abs().max().item()
            found.append(
                {
                    **input.key,
                    "result": name,
                    "unit": _short(unit),
                    "errors": {who: _error(of[name], right) for who, of in results.items() if name in of},
                }
            )
    return found


def measure_all(names=tuple(OPS)):
    """The rows of all inputs of these ops, with our errors at each level."""
    rows = measure(all_inputs(names=names), others=True)
    for level in _LEVELS.get(report.cpu_level(), ())[1:]:
        env = {**os.environ, "PPO_EXT_CPU_LEVEL": level}
        command = [sys.executable, "-m", "bench.accuracy", "--ours", *names]
        output = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout
        for row, other in zip(rows, json.loads(output), strict=True):
            row["errors"] |= other["errors"]
    return rows


def with_kept(figures):
    """These figures and those that are kept of all other ops, in the order of the table."""
    order = list(dict.fromkeys(input.op for input in all_inputs()))
    kept, names = accuracy_pages.load(), figures["stamps"]
    rows = figures["rows"] + [row for row in kept["rows"] if row["op"] in order and row["op"] not in names]
    stamps = kept["stamps"] | names
    return {
        "stamps": {name: stamps[name] for name in order},
        "rows": sorted(rows, key=lambda row: order.index(row["op"])),
    }


def main(argv=None):
    """Measures, prints the tables and, with --save, writes them to bench/evidence."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="OP", help="measure these ops; default: all")
    parser.add_argument(
        "--save", action="store_true", help="keep the figures in bench/evidence/accuracy.*, beside those of other ops"
    )
    parser.add_argument("--ours", action="store_true", help="print our rows at this level alone, as JSON")
    options = parser.parse_args(argv)
    if set(options.names) - set(OPS):
        parser.error(f"OP must be one of {', '.join(OPS)}, got {', '.join(options.names)}")
    names = tuple(options.names) or tuple(OPS)
    torch.set_num_threads(1)  # torch's results depend on the number of threads
    if options.ours:
        print(json.dumps(measure(all_inputs(names=names))))
        return
    figures = {"stamps": dict.fromkeys(names, machine.stamp(torch.device("cpu"))), "rows": measure_all(names)}
    if options.save:
        figures = with_kept(figures)
        accuracy_pages.save(figures)
    print(accuracy_pages.markdown(figures))


if __name__ == "__main__":
    main()
