"""The command line: runs the benchmarks, prints the tables, and with --save keeps the raw rows."""

import argparse
import importlib
import logging
import os
import pathlib
import sys

import torch
import tqdm

from ppo_ext.ops import _native
from tests.ops import STEMS

from . import machine, rows, table
from .rows import RESULTS

MODULES = (*STEMS, "loss_head", "step", "overhead", "binding_overhead", "sweeps")
# Upper estimates of the time of a case on 2 cores or a GPU: to make its inputs and float64 reference; for each
# implementation, to check it, to warm it up and to exceed the requested seconds; and for torch.compile.
_CASE_SECONDS, _IMPLEMENTATION_SECONDS, _COMPILE_SECONDS = 1.0, 0.6, 4.0


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="every shape, dtype, pass and sweep; half an hour on 2 cores"
    )
    parser.add_argument("--only", nargs="+", choices=MODULES, default=MODULES, metavar="OP", help=", ".join(MODULES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each implementation of a case")
    parser.add_argument(
        "--save",
        nargs="?",
        const=RESULTS,
        type=pathlib.Path,
        metavar="FOLDER",
        help=f"write the rows under FOLDER/<machine>/, by default bench/{RESULTS.name}/<machine>/",
    )
    return parser.parse_args(argv)


def warn_if_busy():
    """On a busy machine the threads of a parallel loop wait for the one that was interrupted, so times are off by far
    more than the other work's share."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(
            f"WARNING: load average {load:.1f} on {os.cpu_count()} cores: wait until the machine is quiet before you "
            "trust or save these numbers"
        )


def suite(names, device, full):
    """The cases of these modules."""
    modules = [importlib.import_module(f"bench.bench_{name}") for name in names]
    return [case for module in modules for case in module.suite(device, full)]


def budget_seconds(cases, device, seconds):
    """An upper estimate of the time of these cases, as if every peer were installed."""
    total = 0.0
    for case in cases:
        compiled = sum(getattr(implementation, "compiled", False) for implementation in case.implementations.values())
        each = seconds * len(case.settings(device)) + (_IMPLEMENTATION_SECONDS if case.kind == "speed" else 0.0)
        total += _CASE_SECONDS + (len(case.implementations) + 1) * each + compiled * _COMPILE_SECONDS
    return total


def main(argv=None):
    """Runs the chosen benchmarks and returns their rows."""
    arguments = _arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"ppo_ext backends: {_native.status()}")
    print("; ".join(f"{name} {value}" for name, value in machine.stamp(device).items()))
    warn_if_busy()
    cases = suite(arguments.only, device, arguments.full)
    selection = {case.title for case in suite(arguments.only, device, False)}
    print(f"{len(cases)} cases, about {budget_seconds(cases, device, arguments.seconds) / 60:.0f} minutes")
    torch._logging.set_logs(
        dynamo=logging.ERROR, inductor=logging.ERROR
    )  # hides torch.compile's advice about the graph breaks of the baselines
    measured = []
    for case in (bar := tqdm.tqdm(cases, unit="case", file=sys.stderr)):
        bar.set_description(case.title)
        selected = case.featured or case.title in selection
        new = [{"selected": selected, **row} for row in case.rows(device, seconds=arguments.seconds)]
        measured += new
        if arguments.save:
            rows.save(new, arguments.save)  # after each case, so that a run that is stopped keeps what it has measured
    print(table.text(measured) if measured else "nothing of this is in the selection; add --full")
    if arguments.save and measured:
        print(f"rows saved under {arguments.save / rows.folder_of(measured[0])}; now `python -m bench.render`")
    return measured
