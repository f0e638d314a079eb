"""Peak memory, time and collectives of one `PPOTrainer.step` on two processes: `python -m bench.count_collectives`.

Two processes of this machine (gloo, one thread each) train GPT-2 with 2 layers by DDP; the second step is measured. Each
collective is listed with its caller, which says why it is there. `--save` keeps the row in bench/evidence/collectives.json
and renders collectives.md from it.
"""

import argparse
import collections
import json
import os
import pathlib
import resource
import sys
import tempfile
import time
import traceback

import torch

ROOT = pathlib.Path(__file__).parent.parent
EVIDENCE = ROOT / "bench/evidence"
_COUNTED = ("all_gather_into_tensor", "all_reduce", "all_gather", "broadcast", "barrier")
WHY = {
    "_check_together": "the checks of the batch: an error of one process is raised by all",
    "_pad_across_processes": "one padded length, so that the statistics of each sample can be gathered",
    "_raised_by_all": "the forward passes and rewards: an error of one process is raised by all",
    "compute_advantages": "whitening: count, mean and squared deviations of all tokens",
    "weights_of_minibatches": "the tokens of each update, once an epoch",
    "judge": "the mean ratio, finite losses and errors, once an update, before its last backward pass",
    "_check_weights": "finite weights, at the end",
    "stack_whole_updates": "the statistics of the minibatches",
    "_all_samples": "the statistics of the samples",
}


def _record(found):
    for name in _COUNTED:
        function = getattr(torch.distributed, name)

        def call(*args, name=name, function=function, **kwargs):
            frames = [frame.name for frame in traceback.extract_stack()]
            known = [frame for frame in frames if frame in WHY]
            found.append((known[-1] if known else frames[-2], name))
            return function(*args, **kwargs)

        setattr(torch.distributed, name, call)


def measure(rank, folder):
    """The rows of one process; called by tests/process_group.py."""
    import tiny_models

    found = []
    trainer = tiny_models.trainer(
        changes={"vocab_size": 8192, "n_embd": 128, "n_positions": 128},
        accelerator_kwargs={"cpu": True},
        batch_size=8,
        mini_batch_size=4,
        ppo_epochs=2,
    )
    batch = tiny_models.batch(8, rank)
    trainer.step(*batch)
    _record(found)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    trainer.step(*batch)
    seconds = time.perf_counter() - started
    counts = collections.Counter(found)
    return {
        "seconds": seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_mib_after_the_first_step": held / 1024,
        "updates": 4,
        "epochs": 2,
        "collectives": [{"where": where, "kind": kind, "count": n} for (where, kind), n in counts.items()],
    }


def render(row):
    """The page of one row."""
    lines = [
        "# Collectives of one step on two processes",
        "",
        "Written by `python -m bench.count_collectives --save`. One `PPOTrainer.step` of "
        f"{row['epochs']} epochs with {row['updates']} updates in all, GPT-2 with 2 layers, DDP over gloo, one thread each: "
        f"{row['seconds']:.2f} s; the peak of a process is {row['peak_mib']:.0f} MiB resident, with all that it has "
        "imported. What DDP does by itself is not counted, as it does not go through Python: the reduction of the "
        "gradients in every update, and the broadcast of the model's buffers before the forward pass behind it.",
        "",
        "| where | collective | in one step | why |",
        "| --- | --- | --- | --- |",
    ]
    for entry in row["collectives"]:
        why = WHY.get(entry["where"], "")
        lines.append(f"| `{entry['where']}` | {entry['kind']} | {entry['count']} | {why} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep the row and render the page")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import process_group

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        row = process_group.run(__file__, {"measure": 2}, folder)["measure"][0]
    if options.save:
        (EVIDENCE / "collectives.json").write_text(json.dumps(row, indent=1) + "\n")
        (EVIDENCE / "collectives.md").write_text(render(row))
    print(render(row))


if __name__ == "__main__":
    main()
