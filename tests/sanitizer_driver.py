"""Runs every op, forward and backward, on small inputs of odd sizes, strides and masks, and compares with the CPU's
results.

    compute-sanitizer --tool racecheck python tests/sanitizer_driver.py --device cuda

Inputs are made on the CPU and copied, so that nearly all kernels that run on the GPU are those of ppo_ext.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from cases import FLOATS  # noqa: E402
from every_op import CALLS, call_of  # noqa: E402
from ops import LOGITS, OPS, REF_LOGITS  # noqa: E402

import ppo_ext  # noqa: E402

VOCABULARIES = (
    1,
    7,
    33,
    1000,
    1025,
    1032,
    2049,
    4104,
)  # for one warp and for a block, for parts and several batches of loads, odd and aligned
LAYOUTS = ("dense", "vocabulary first", "every second column", "offset by one")
# A gradient in half precision is rounded once; all else is float32 that was summed in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-9}


def placed(logits, layout, device):
    """The logits on the device, in one of LAYOUTS."""
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


def run_layouts(op, options, vocabulary, dtype, device):
    """Runs an op on logits in every layout; returns the number of runs."""
    call = call_of(op, options, (2, 3), vocabulary, dtype)
    inputs = call.make("cpu")
    expected = call.run(inputs)
    on_device = {name: x.to(device) for name, x in inputs.items()}
    logits = [name for name, role in op.arguments.items() if role in (LOGITS, REF_LOGITS)]
    for layout in LAYOUTS:
        close(call.run(on_device | {name: placed(inputs[name], layout, device) for name in logits}), expected, dtype)
    return len(LAYOUTS)


def run_logits(device):
    """Runs every op on logits with all dtypes, vocabularies, variants and layouts; returns the number of runs."""
    return sum(
        run_layouts(op, options, vocabulary, dtype, device)
        for dtype in FLOATS
        for vocabulary in VOCABULARIES
        for op in OPS.values()
        if op.on_logits
        for options in ({}, *op.variants.values())
    )


def run_calls(device):
    """Runs every call of every_op.py once; returns the number of runs."""
    for call in CALLS.values():
        inputs = call.make("cpu")
        dtype = next((inputs[name].dtype for name in ("logits", "hidden") if name in inputs), torch.float32)
        close(call.run({name: x.to(device) for name, x in inputs.items()}), call.run(inputs), dtype)
    return len(CALLS)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    if device.type == "cuda":  # each tensor gets an allocation of its own, so that an access beyond it is an error
        os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    assert ppo_ext.ops._native.available(device.type), "the compiled ops must be loaded, or nothing of them is checked"
    torch.manual_seed(0)
    print(f"sanitizer_driver: {run_logits(device) + run_calls(device)} runs on {device}, all close to the CPU's")


if __name__ == "__main__":
    main()
