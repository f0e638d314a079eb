"""Every hot kernel once, forward and backward, at the reference shape, for a profiler:

ncu --kernel-name "regex:(forward|backward)_kernel" python -m bench.hot_kernels
"""

import argparse

import torch

import ppo_ext

from .cases import LLAMA, logits_inputs


def run(inputs):
    """Both passes of the three ops on logits; the number of gradients."""
    labels, count = inputs["labels"], 0
    others = {ppo_ext.logprobs: labels, ppo_ext.logprobs_and_entropy: labels, ppo_ext.full_kl: inputs["ref_logits"]}
    for op, other in others.items():
        logits = inputs["logits"].detach().requires_grad_()
        results = op(logits, other)
        results = results if isinstance(results, tuple) else (results,)
        incoming = (inputs["grad_logprobs"], inputs["grad_entropy"])
        count += len(torch.autograd.grad(results, logits, incoming[: len(results)]))
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
