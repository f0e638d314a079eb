"""Runs a function of a test module on several processes of this machine, which talk by gloo.

`run(__file__, "work", processes=2, folder=tmp_path)` calls `work(rank, folder)` on each and returns their results, in rank
order. To start a group takes seconds, so one call does the work of many tests.
"""

import importlib
import os
import pathlib
import socket
import subprocess
import sys

import torch

TESTS = pathlib.Path(__file__).parent


def start(module, function, processes, folder):
    """The processes, running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(TESTS), str(TESTS.parent)]))
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "PYTHONPATH": path}
    common |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, pathlib.Path(module).stem, function, str(folder)]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def run(module, function, processes, folder, seconds=300):
    """What the function returns on each process."""
    started = start(module, function, processes, folder)
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    failed = [(rank, out) for rank, (p, out) in enumerate(zip(started, outputs, strict=True)) if p.returncode]
    assert not failed, "\n".join(f"process {rank}:\n{out[-6000:]}" for rank, out in failed)
    paths = [os.path.join(folder, f"{function}.{rank}.pt") for rank in range(processes)]
    return [torch.load(path, weights_only=False) for path in paths]


def main(module, function, folder):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    result = getattr(importlib.import_module(module), function)(rank, folder)
    torch.save(result, os.path.join(folder, f"{function}.{rank}.pt"))
    torch.distributed.barrier()  # without a barrier gloo's threads may abort the process that exits first
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
