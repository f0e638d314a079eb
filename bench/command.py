"""The command line: runs the benchmarks, prints the tables, and with --save keeps the raw rows."""

import argparse
import importlib
import json
import logging
import os
import pathlib
import re
import sys

import torch
import tqdm

from ppo_ext import _native

from . import table, timing

MODULES = ("logprobs", "full_kl", "gae", "rewards", "whiten", "ppo_loss", "loss_head", "step", "binding_overhead")
RESULTS = pathlib.Path(__file__).parent / "results"


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every shape, dtype and pass; half an hour on 2 cores")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=MODULES, metavar="OP", help=", ".join(MODULES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each implementation of a case")
    parser.add_argument("--save", nargs="?", const=RESULTS, type=pathlib.Path, metavar="FOLDER",
                        help=f"write the rows under FOLDER/<machine>/, by default bench/{RESULTS.name}/<machine>/")
    return parser.parse_args(argv)


def warn_if_busy():
    """Other work on the cores makes thread pools wait for each other, by far more than a fair share would cost."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(f"WARNING: load average {load:.1f} on {os.cpu_count()} cores: wait until the machine is quiet before you "
              "trust or save these numbers")


def folder_of(row):
    """The name of one machine's folder: its device and, on a CPU, the number of threads."""
    name = row["device"] if "NVIDIA" in row["device"] else f"{row['device']} {row['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(rows, results=RESULTS):
    """One file per op; a new run replaces the rows of the cases that it measured."""
    for op in sorted({row["op"] for row in rows}):
        new = [row for row in rows if row["op"] == op]
        path = results / folder_of(new[0]) / f"{op}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        measured = {table.case_key(row) for row in new}
        kept = [row for row in old if table.case_key(row) not in measured]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept + new))


def main(argv=None):
    """Runs the chosen benchmarks and returns their rows."""
    arguments = _arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"ppo_ext backends: {_native.status()}")
    print("; ".join(f"{name} {value}" for name, value in timing.stamp(device).items()))
    warn_if_busy()
    modules = [importlib.import_module(f"bench.bench_{name}") for name in arguments.only]
    items = [item for module in modules for item in module.suite(device, arguments.full)]
    selection = {item.title for module in modules for item in module.suite(device, False)}
    torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)  # advice about the baselines' graph breaks
    rows = []
    for item in (bar := tqdm.tqdm(items, unit="case", file=sys.stderr)):
        bar.set_description(item.title)
        new = [{**row, "selected": item.title in selection} for row in item.rows(device, seconds=arguments.seconds)]
        rows += new
        if arguments.save:
            save(new, arguments.save)  # at once: a run that is stopped leaves what it has measured
    print(table.text(rows) if rows else "nothing of this is in the selection; add --full")
    if arguments.save and rows:
        print(f"rows saved under {arguments.save / folder_of(rows[0])}; now `python -m bench.render`")
    return rows
