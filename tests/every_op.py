"""Every op, forward and backward, as one table, and what must hold of each of them on any device."""

import dataclasses
from collections.abc import Callable

import torch
from cases import logits_inputs, token_inputs
from conftest import assert_same_bits, assert_within_torch_error

import ppo_ext
from ppo_ext.ops import reference


@dataclasses.dataclass(frozen=True)
class Op:
    """`make(device)` gives inputs, a dict of tensors; `run(inputs)` all results and gradients, without a host sync."""

    make: Callable
    run: Callable


def _grads(outputs, inputs, *incoming):
    """The outputs and the gradients of the inputs."""
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, incoming)]


def logprobs(inputs, ops=ppo_ext, **options):
    logits = inputs["logits"].detach().requires_grad_()
    result = ops.logprobs(logits, inputs["labels"], mask=inputs["mask"], **options)
    return _grads([result], logits, inputs["grad_logprobs"].to(result.dtype))


def logprobs_and_entropy(inputs, ops=ppo_ext, **options):
    logits = inputs["logits"].detach().requires_grad_()
    results = ops.logprobs_and_entropy(logits, inputs["labels"], mask=inputs["mask"], temperature=0.7, **options)
    incoming = [inputs[name].to(results[0].dtype) for name in ("grad_logprobs", "grad_entropy")]
    return _grads(results, logits, *incoming)


def full_kl(inputs, ops=ppo_ext, **options):
    logits = inputs["logits"].detach().requires_grad_()
    result = ops.full_kl(logits, inputs["ref_logits"], mask=inputs["mask"], **options)
    return _grads([result], logits, inputs["grad_logprobs"].to(result.dtype))


def in_place(run):
    """`run` with the gradient written over a private copy of the logits."""
    return lambda inputs: run({**inputs, "logits": inputs["logits"].clone()}, inplace_backward=True)


def kl_rewards(inputs, ops=ppo_ext):
    names = ("scores", "logprobs", "ref_logprobs", "mask")
    return [*ops.kl_rewards(*(inputs[name] for name in names), kl_coef=0.2)]


def gae(inputs, ops=ppo_ext):
    return [*ops.gae(inputs["values"], inputs["rewards"], inputs["mask"], gamma=0.99)]


def masked_mean(inputs):
    values = inputs["values"].detach().requires_grad_()
    results = [ppo_ext.masked_mean(values, inputs["mask"]), ppo_ext.masked_mean(values, inputs["mask"], axis=1)]
    return _grads(results, values, inputs["scores"][0], inputs["scores"])


def masked_var(inputs):
    values = inputs["values"].detach().requires_grad_()
    return _grads([ppo_ext.masked_var(values, inputs["mask"])], values, inputs["scores"][0])


def masked_whiten(inputs):
    values = inputs["values"].detach().requires_grad_()
    return _grads([ppo_ext.masked_whiten(values, inputs["mask"])], values, inputs["advantages"])


def ppo_loss(inputs):
    logprobs, vpreds = (inputs[name].detach().requires_grad_() for name in ("logprobs", "vpreds"))
    others = [inputs[name] for name in ("values", "returns", "mask")]
    loss, stats = ppo_ext.ppo_loss(logprobs, inputs["old_logprobs"], inputs["advantages"], vpreds, *others)
    return [*_grads([loss], (logprobs, vpreds), inputs["scores"][0]), *stats.values()]


def _logits(*shape, dtype=torch.bfloat16):
    return lambda device: logits_inputs(shape, dtype, device)


def _tokens(*shape):
    return lambda device: token_inputs(shape, device)


OPS = {
    "logprobs": Op(_logits(3, 5, 4099), logprobs),
    "logprobs_and_entropy": Op(_logits(3, 5, 4104), logprobs_and_entropy),
    "logprobs_and_entropy of a short row": Op(_logits(3, 5, 250, dtype=torch.float32), logprobs_and_entropy),
    "logprobs in place": Op(_logits(3, 5, 4104), in_place(logprobs)),
    "full_kl": Op(_logits(3, 5, 4104), full_kl),
    "full_kl in place": Op(_logits(3, 5, 4099), in_place(full_kl)),
    "kl_rewards": Op(_tokens(9, 257), kl_rewards),
    "gae": Op(_tokens(9, 257), gae),
    "gae of long sequences": Op(_tokens(3, 5000), gae),
    "masked_mean": Op(_tokens(9, 2570), masked_mean),
    "masked_var": Op(_tokens(9, 2570), masked_var),
    "masked_whiten": Op(_tokens(9, 2570), masked_whiten),
    "ppo_loss": Op(_tokens(9, 257), ppo_loss),
    "ppo_loss of many tokens": Op(_tokens(9, 2570), ppo_loss),
}


def assert_same_results(name, results, expected):
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert_same_bits(f"{name}, result {i}", a, b)


# ---- what must hold -------------------------------------------------------------------------------------------------


def check_same_bits_on_every_run(op, device, repeats):
    inputs = op.make(device)
    first = op.run(inputs)
    for number in range(repeats - 1):
        assert_same_results(f"run {number + 2}", op.run(inputs), first)


def check_no_host_sync(op, device):
    """torch raises in this mode where a call of its own waits for the device."""
    inputs = op.make(device)
    op.run(inputs)  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_graph_replay(op, device):
    """Captured on one input and replayed on another, forward and backward give the bits of an eager run."""
    static, other = op.make(device), op.make(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        op.run(static)  # the first run outside the capture, as torch's notes ask
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = op.run(static)
    for name, x in other.items():
        static[name].copy_(x)
    graph.replay()
    assert_same_results("replay", results, op.run(other))


def check_current_stream(op, device):
    """The inputs are written late on a stream of their own: a kernel on another stream would read the zeros before."""
    inputs = op.make(device)
    expected = op.run(inputs)
    late = {name: torch.zeros_like(x) for name, x in inputs.items()}
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
        for name, x in inputs.items():
            late[name].copy_(x)
        results = op.run(late)
    stream.synchronize()
    assert_same_results("on the stream", results, expected)


def check_device_guard(op, device, other):
    """Inputs on a device that is not the current one."""
    inputs = op.make(device)
    with torch.cuda.device(device):
        results = op.run({name: x.to(other) for name, x in inputs.items()})
    assert all(x.device == other for x in results)
    assert_same_results("on the other device", [x.to(device) for x in results], op.run(inputs))


def check_against_reference(run, inputs):
    """All results of `run` within the error of the same in plain torch."""
    exact = run({name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}, reference)
    for i, triple in enumerate(zip(run(inputs), run(inputs, reference), exact, strict=True)):
        assert_within_torch_error(f"result {i}", *triple)


def check_rows_beyond(rows, vocabulary, element, device):
    """Of logits [1, rows, vocabulary], the rows around a flat index are what they are alone, forward and backward."""
    mask = torch.ones(1, rows, dtype=torch.bool, device=device)
    inputs = {
        "logits": torch.empty((1, rows, vocabulary), dtype=torch.bfloat16, device=device).normal_(),
        "mask": mask,
        "labels": torch.randint(vocabulary, (1, rows), device=device),
    }
    inputs |= {name: torch.randn(1, rows, device=device) for name in ("grad_logprobs", "grad_entropy")}
    around = element // vocabulary
    mask[0, around - 2] = False
    chosen = [0, 1, around - 2, around - 1, around, around + 1, rows - 1]
    alone = {name: x[:, chosen] for name, x in inputs.items()}
    results = logprobs_and_entropy(inputs)
    assert_same_results("rows", [x[:, chosen] for x in results], logprobs_and_entropy(alone))
    exact = logprobs_and_entropy({**alone, "logits": alone["logits"].double()}, reference)
    torchs = logprobs_and_entropy({**alone, "logits": alone["logits"].float()}, reference)
    for name, x, y, z in zip(("logprobs", "entropy"), results, torchs, exact):
        assert_within_torch_error(name, x[:, chosen], y, z)
