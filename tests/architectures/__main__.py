"""Every architecture of the installed transformers in the trainer: `python -m tests.architectures`, or names of some.

Each runs in a process of its own, which ends after a time limit, so that neither a crash nor an endless loop stops the
others.
"""

import argparse
import json
import multiprocessing
import pathlib
import resource
import sys

import torch
import tqdm
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))

from bench import machine  # noqa: E402

from . import checks, pages, tiny  # noqa: E402

CPU_SECONDS, SECONDS, BYTES = 180, 300, 8 << 30  # of one architecture; SECONDS without a sign of life


def _run(name, kind, chosen, connection):
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    try:
        model = tiny.build(name, kind)
    except tiny.CannotBuild as error:
        connection.send({"reason": str(error)})
        return
    connection.send({"class": type(model).__name__})
    subject = checks.Subject(model, kind)
    for check in chosen:
        connection.send({check: checks.run(subject, [check])[check]})


def run(name, kind, chosen=tuple(checks.CHECKS), seconds=SECONDS):
    """The row of one architecture: why it cannot be built, or what each check gave."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(name, kind, chosen, theirs))
    process.start()
    theirs.close()
    row = {"model_type": name, "kind": kind, "class": None, "reason": None, "checks": {}}
    try:
        while ours.poll(seconds):
            found = ours.recv()
            row |= {key: found.pop(key) for key in ("class", "reason") if key in found}
            row["checks"] |= found
        stopped = f"no end after {seconds} seconds"
    except EOFError:
        stopped = f"the process ended, or had {CPU_SECONDS} seconds of processor time"
    process.kill()
    process.join()
    if row["class"]:
        row["checks"] |= {check: stopped for check in chosen if check not in row["checks"]}
    else:
        row["reason"] = row["reason"] or stopped
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; default: all")
    parser.add_argument(
        "--save",
        action="store_true",
        help="keep the rows, beside those of others, in bench/evidence/architectures.json",
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warm_up()
    rows = []
    chosen = [found for found in tiny.architectures() if not options.names or found[0] in options.names]
    for name, kind in tqdm.tqdm(chosen, unit="architecture", disable=not sys.stderr.isatty()):
        rows.append(run(name, kind))
        print(json.dumps(rows[-1]), flush=True)
    if options.save:
        stamp = machine.stamp(torch.device("cpu"))
        pages.save(pages.merged({"stamp": stamp, "transformers": transformers.__version__, "rows": rows}))


def warm_up():
    """Imports in this process what each of the others would have to."""
    for name, kind in (("llama", tiny.CAUSAL), ("t5", tiny.SEQ2SEQ)):
        checks.run(checks.Subject(tiny.build(name, kind), kind))


if __name__ == "__main__":
    main()
