"""The kernels of every op on logits once, forward and backward, at the reference shape, for a profiler:

ncu --kernel-name "regex:(forward|backward)_kernel" python -m bench.hot_kernels
"""

import argparse

import torch

from tests.ops import OPS

from .cases import LLAMA, logits_inputs


def run(inputs):
    """Runs both passes of every op that takes logits alone; returns the number of gradients."""
    count = 0
    for op in OPS.values():
        given = {name: inputs.get(name) for name in op.tensors if name != "mask"}
        if op.on_logits and None not in given.values():
            results = op.run(given)
            count += sum(name.startswith("grad_") for name in results)
    return count


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.hot_kernels", description=__doc__)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=LLAMA)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    count = run(logits_inputs((options.rows, options.vocabulary), torch.bfloat16, options.device))
    print(f"hot_kernels: {count} gradients of [{options.rows}, {options.vocabulary}] on {options.device}")


if __name__ == "__main__":
    main()
