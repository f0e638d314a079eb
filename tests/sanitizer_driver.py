"""Every op, forward and backward, once on small odd, strided and masked inputs, compared with the CPU's results.

    compute-sanitizer --tool racecheck python tests/sanitizer_driver.py --device cuda

Inputs are made on the CPU and copied, so that nearly all kernels that run are those of ppo_ext.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from cases import FLOATS, logits_inputs  # noqa: E402
from every_op import OPS, full_kl, in_place, logprobs, logprobs_and_entropy  # noqa: E402

import ppo_ext  # noqa: E402

VOCABULARIES = (1, 7, 33, 1000, 1025, 1032, 2049, 4104)  # below and above a warp's and a batch's, odd and aligned
LAYOUTS = ("dense", "vocabulary first", "every second column", "offset by one")
RUNS = {
    "logprobs": logprobs,
    "logprobs_and_entropy": logprobs_and_entropy,
    "full_kl": full_kl,
    "full_kl in place": in_place(full_kl),
}
# a gradient in half precision is rounded once; all else is float32 in another order of summation
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-9}


def placed(logits, layout, device):
    """The logits on the device in one of LAYOUTS."""
    if layout == "vocabulary first":
        return logits.movedim(-1, 0).contiguous().to(device).movedim(0, -1)
    if layout == "every second column":
        return logits.repeat_interleave(2, -1).to(device)[..., ::2]
    if layout == "offset by one":
        return torch.cat([logits.new_zeros(1), logits.flatten()]).to(device)[1:].view(logits.shape)
    return logits.to(device)


def close(results, expected, dtype):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def run_logits(device):
    """One pass over dtypes, vocabularies and layouts; the number of runs."""
    count = 0
    for dtype in FLOATS:
        for vocabulary in VOCABULARIES:
            inputs = logits_inputs((2, 3, vocabulary), dtype)
            expected = {name: run(inputs) for name, run in RUNS.items()}
            for layout in LAYOUTS:
                logits = {name: placed(inputs[name], layout, device) for name in ("logits", "ref_logits")}
                there = {name: x.to(device) for name, x in inputs.items()} | logits
                for name, run in RUNS.items():
                    close(run(there), expected[name], dtype)
                    count += 1
    return count


def run_tokens(device):
    """Every op of the table once; the number of runs."""
    for op in OPS.values():
        inputs = op.make("cpu")
        dtype = inputs["logits"].dtype if "logits" in inputs else torch.float32
        close(op.run({name: x.to(device) for name, x in inputs.items()}), op.run(inputs), dtype)
    return len(OPS)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    if device.type == "cuda":  # each tensor an allocation of its own, so that a step out of one is a step out of memory
        os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    assert ppo_ext.ops._native.available(device.type), "the compiled ops must be loaded, or nothing of them is checked"
    torch.manual_seed(0)
    print(f"sanitizer_driver: {run_logits(device) + run_tokens(device)} runs on {device}, all close to the CPU's")


if __name__ == "__main__":
    main()
