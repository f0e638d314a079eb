"""Calls of every op of ops.py, forward and backward, in a few sizes and variants, and checks that each must pass on any
device."""

import dataclasses
from collections.abc import Callable

import torch
from cases import valid_arguments
from conftest import assert_same_bits, assert_within_torch_error
from ops import OPS, Mode

from ppo_ext.ops import reference

# ([B, T], vocabulary, dtype) of the ops on logits: odd rows, rows aligned to 16 bytes, and rows that one warp takes
LOGITS_SIZES = (((3, 5), 4099, torch.bfloat16), ((3, 5), 4104, torch.bfloat16), ((3, 5), 250, torch.float32))
# [B, T] of the others: one block of threads, many blocks, and sequences of several tiles
TOKEN_SIZES = ((9, 257), (9, 2570), (3, 5000))


@dataclasses.dataclass(frozen=True)
class Call:
    """`make(device)` gives inputs, a dict of tensors; `run(inputs)` all results and gradients."""

    make: Callable
    run: Callable


def call_of(op, options, shape, vocabulary, dtype, tensors=()):
    """The Call of an op with these options and optional tensors, and at this size. Its inputs are the arguments and, as
    grad_<result>, the incoming gradients, so that a replayed CUDA graph can be given others."""

    def make(device):
        inputs = valid_arguments(op, shape, vocabulary, device, dtype, Mode(options, tensors))
        inputs = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
        if op.differentiable:
            results = op.outputs(inputs | op.required | options)
            inputs |= {f"grad_{name}": torch.randn_like(results[name]) for name in op.with_gradient}
        return inputs

    def run(inputs):
        arguments = {name: inputs[name] for name in op.tensors if name in inputs} | op.required | options
        if options.get("inplace_backward"):
            arguments |= {name: arguments[name].clone() for name in op.differentiable}
        grads = {name: inputs[f"grad_{name}"] for name in op.results if f"grad_{name}" in inputs}
        return list(op.run(arguments, grads).values())

    return Call(make, run)


def calls_of(op):
    """{title: Call} of an op."""
    sizes = LOGITS_SIZES if op.has_vocabulary else [(shape, 1, torch.float32) for shape in TOKEN_SIZES]
    variants = {title: Mode(options) for title, options in {"": {}, **op.variants}.items()} | op.modes
    return {
        f"{op.name}{', ' * bool(variant)}{variant}, {'x'.join(map(str, shape))}{f'x{V}' * op.has_vocabulary}": call_of(
            op, mode.options, shape, V, dtype, mode.tensors
        )
        for variant, mode in variants.items()
        for shape, V, dtype in sizes
    }


CALLS = {title: call for op in OPS.values() for title, call in calls_of(op).items()}


def assert_same_results(name, results, expected):
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert_same_bits(f"{name}, result {i}", a, b)


# ---- what must hold -------------------------------------------------------------------------------------------------


def check_same_bits_on_every_run(call, device, repeats):
    inputs = call.make(device)
    first = call.run(inputs)
    for number in range(repeats - 1):
        assert_same_results(f"run {number + 2}", call.run(inputs), first)


def without_row_count(inputs):
    """The inputs without the mask where the number of the rows that count decides on the sizes of matrix products: the
    host waits for it, and while a graph is captured it is not known, so that other products are computed. None for a
    whole loss, which needs the mask."""
    if not isinstance(inputs, dict) or "hidden" not in inputs:
        return inputs
    if "old_logprobs" in inputs:
        return None
    return {name: x for name, x in inputs.items() if name != "mask"}


def check_no_host_sync(call, device):
    """No host/device sync in a second call. In this debug mode torch raises an error where one of its own functions
    waits."""
    inputs = without_row_count(call.make(device))
    if inputs is None:
        return
    call.run(inputs)  # what is set up in the first call may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_graph_replay(call, device):
    """Captured in a CUDA graph on one input and replayed on another, a call gives the same bits as an eager run on the
    other."""
    static, other = (without_row_count(call.make(device)) for _ in range(2))
    if static is None:
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call.run(static)  # torch's documentation asks for a first run outside of the capture
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run(static)
    for name, x in other.items():
        static[name].copy_(x)
    graph.replay()
    assert_same_results("replay", results, call.run(other))


def check_current_stream(call, device):
    """The kernels run on the current stream. The inputs are zeros until a slow stream overwrites them, so a kernel on
    any other stream would read the zeros."""
    inputs = call.make(device)
    expected = call.run(inputs)
    late = {name: torch.zeros_like(x) for name, x in inputs.items()}
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
        for name, x in inputs.items():
            late[name].copy_(x)
        results = call.run(late)
    stream.synchronize()
    assert_same_results("on the stream", results, expected)


def check_device_guard(call, device, other):
    """Inputs on a device that is not the current one give the same bits."""
    inputs = call.make(device)
    with torch.cuda.device(device):
        results = call.run({name: x.to(other) for name, x in inputs.items()})
    assert all(x.device == other for x in results)
    assert_same_results("on the other device", [x.to(device) for x in results], call.run(inputs))


def check_rows_beyond(rows, vocabulary, element, device):
    """Of logits [1, rows, vocabulary], the rows around the flat index `element` have the same results and gradients as
    alone."""
    op, mask = OPS["logprobs_and_entropy"], torch.ones(1, rows, dtype=torch.bool, device=device)
    inputs = {
        "logits": torch.empty((1, rows, vocabulary), dtype=torch.bfloat16, device=device).normal_(),
        "mask": mask,
        "labels": torch.randint(vocabulary, (1, rows), device=device),
    }
    grads = {name: torch.randn(1, rows, device=device) for name in op.results}
    around = element // vocabulary
    mask[0, around - 2] = False
    chosen = [0, 1, around - 2, around - 1, around, around + 1, rows - 1]
    alone, grads_alone = ({name: x[:, chosen] for name, x in of.items()} for of in (inputs, grads))
    results = op.run(inputs, grads)
    assert_same_results("rows", [x[:, chosen] for x in results.values()], list(op.run(alone, grads_alone).values()))
    exact, torchs = (
        op.run(alone | {"logits": alone["logits"].to(dtype)}, grads_alone, reference)
        for dtype in (torch.float64, torch.float32)
    )
    for name in op.results:
        assert_within_torch_error(name, results[name][:, chosen], torchs[name], exact[name])
