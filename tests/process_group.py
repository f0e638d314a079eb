"""Runs functions of a test module on several processes of this machine, which talk by gloo.

`run(__file__, {"work": 2}, folder)["work"]` calls `work(rank, folder)` on 2 processes and gives their results in rank order.
One process imports the module and then forks the others, since the imports cost more than the tests; so one call does the
work of many tests, and nothing may be trained while the module is imported.
"""

import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import traceback

import torch

TESTS = pathlib.Path(__file__).parent


def run(module, functions, folder, seconds=300, may_die=()):
    """{function: what it returned on each process}; None for a process that a function of `may_die` has ended.

    functions: {name: number of processes}; they run one after another. "work 3" calls work(rank, folder, 3).
    """
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(TESTS), str(TESTS.parent)]))
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    arguments = [pathlib.Path(module).stem, json.dumps(functions), str(folder), ",".join(may_die)]
    result = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    return {name: [_result(folder, name, rank) for rank in range(count)] for name, count in functions.items()}


def _result(folder, function, rank):
    path = os.path.join(folder, f"{function}.{rank}.pt")
    return torch.load(path, weights_only=False) if os.path.exists(path) else None


def _call(module, function, rank, folder):
    """In a forked process: the function between the beginning and the end of the group."""
    torch.distributed.init_process_group("gloo")
    name, *arguments = function.split()
    result = getattr(module, name)(rank, folder, *map(int, arguments))
    torch.save(result, os.path.join(folder, f"{function}.{rank}.pt"))
    torch.distributed.barrier()  # without a barrier gloo's threads may abort the process that exits first
    torch.distributed.destroy_process_group()


def _fork(module, function, rank, folder):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _call(module, function, rank, folder)
            status = 0
        except BaseException:
            print(f"process {rank} of {function}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def main(name, functions, folder, may_die):
    torch.set_num_threads(1)
    module = importlib.import_module(name)
    failed = False
    for function, count in json.loads(functions).items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        children = [_fork(module, function, rank, folder) for rank in range(count)]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        failed = failed or (any(statuses) and function not in may_die.split(","))
    sys.exit(failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
