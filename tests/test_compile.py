"""Every op under torch.compile: alone and after another, each differentiable argument and each result by itself, with and
without a mask, for fixed and for changing shapes."""

import inspect
import itertools

import pytest
import torch
from ops import OPS

import ppo_ext
from ppo_ext.ops import _native

pytestmark = pytest.mark.skipif(_native.status()["cpu"] != "loaded", reason="the compiled part is not built here")

SHAPES = ((2, 3), (3, 5))
NAMES = list(OPS)
PAIRS = [(name, NAMES[i - 1]) for i, name in enumerate(NAMES)]
OPTIONAL_MASK = [name for name in NAMES if inspect.signature(getattr(ppo_ext, name)).parameters["mask"].default is None]


def subsets(names):
    """Each name alone, and all of them."""
    return sorted({*((name,) for name in names), tuple(names)}) if names else [()]


def arguments(op, shape, masked):
    torch.manual_seed(sum(shape))
    return {name: x for name, x in op.pick({}, shape).items() if masked or name != "mask"}


def with_gradients(function, tensors, leaves):
    """The results of the function and the gradients of their weighted sum, where it has any."""
    tensors = {name: x.detach().clone() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    for name in leaves:
        tensors[name].requires_grad_()
    results = function(tensors)
    total = sum((x * torch.linspace(0.5, 2.0, x.numel()).view(x.shape)).sum() for x in results if x.requires_grad)
    grads = torch.autograd.grad(total, [tensors[name] for name in leaves]) if leaves else ()
    return [x.detach() for x in results], grads


def compare(function, compiled, cases, leaves):
    for tensors in cases:
        (expected, grads), (got, got_grads) = (with_gradients(f, tensors, leaves) for f in (function, compiled))
        for a, b in zip([*expected, *grads], [*got, *got_grads], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def check(function, inputs, leaves, *, dynamic, backend="aot_eager"):
    """inputs: one dict of arguments for each shape; changing shapes share a graph, the first shape alone has a fixed one."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    compare(function, compiled, inputs if dynamic else inputs[:1], leaves)


@pytest.mark.parametrize("name", NAMES)
def test_alone(name):
    op = OPS[name]
    for masked in (True, False) if name in OPTIONAL_MASK else (True,):
        inputs = [arguments(op, shape, masked) for shape in SHAPES]
        for leaves, wanted in itertools.product(subsets(op.differentiable), subsets(op.with_gradient)):

            def function(tensors, wanted=wanted):
                outputs = op.outputs(tensors)
                return [outputs[result] for result in wanted]

            check(function, inputs, leaves, dynamic=False)
        check(lambda tensors: list(op.outputs(tensors).values()), inputs, op.differentiable, dynamic=True)


@pytest.mark.parametrize("first, second", PAIRS, ids=str)
def test_in_pairs(first, second):
    inputs = []
    for shape in SHAPES:
        given = {f"{name}.{key}": x for name in (first, second) for key, x in arguments(OPS[name], shape, True).items()}
        inputs.append(given)
    leaves = [f"{name}.{key}" for name in (first, second) for key in OPS[name].differentiable]
    check(lambda tensors: both(tensors, first, second), inputs, leaves, dynamic=False)


def both(tensors, *names):
    """All results of several ops, each on arguments of its own."""
    results = []
    for name in names:
        own = {key.partition(".")[2]: x for key, x in tensors.items() if key.startswith(f"{name}.")}
        results += OPS[name].outputs(own).values()
    return results


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_ops_in_one_graph_of_inductor(dynamic):
    inputs = []
    for shape in SHAPES:
        inputs.append({f"{name}.{key}": x for name in NAMES for key, x in arguments(OPS[name], shape, True).items()})
    leaves = [f"{name}.{key}" for name in NAMES for key in OPS[name].differentiable]
    check(lambda tensors: both(tensors, *NAMES), inputs, leaves, dynamic=dynamic, backend="inductor")


def test_a_minibatch_in_one_graph():
    """The ops as a trainer calls them, one after the other, from logits to the loss."""

    def loss(tensors):
        x = tensors
        logprobs, entropy = ppo_ext.logprobs_and_entropy(x["logits"], x["labels"], mask=x["mask"])
        rewards = ppo_ext.kl_rewards(x["scores"], logprobs.detach(), x["ref_logprobs"], x["mask"], kl_coef=0.1)[0]
        advantages, returns = ppo_ext.gae(x["values"], rewards, x["mask"])
        advantages = ppo_ext.masked_whiten(advantages, x["mask"])
        total, stats = ppo_ext.ppo_loss(
            logprobs, x["old_logprobs"], advantages, x["vpreds"], x["values"], returns, x["mask"]
        )
        return [total - 0.01 * ppo_ext.masked_mean(entropy, x["mask"]), stats["policy/approxkl"]]

    inputs = []
    for shape in SHAPES:
        known = {}
        for name in ("logprobs_and_entropy", "kl_rewards", "ppo_loss"):
            known |= OPS[name].pick(known, shape)
        inputs.append({name: x for name, x in known.items() if isinstance(x, torch.Tensor) and name != "logprobs"})
    check(loss, inputs, ["logits", "vpreds"], dynamic=True)
