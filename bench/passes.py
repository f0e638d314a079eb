"""The passes of an op (forward, backward alone, both): what is timed of each, and what is checked."""

import collections.abc
import dataclasses
import functools

import torch

from .suite import Implementation

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


@dataclasses.dataclass(frozen=True)
class Op:
    """How a benchmark calls an op. `call(inputs, function)` returns the output, or the outputs, of a function that
    computes the op. `leaves` names the inputs that receive a gradient, `incoming` those that hold the incoming
    gradients, one for each output; without any, the first output is a loss. `options`: keyword arguments for our op and
    for the reference, which the functions of the peers already have."""

    call: collections.abc.Callable
    leaves: tuple = ()
    incoming: tuple = ()
    options: dict = dataclasses.field(default_factory=dict)

    def of(self, library, name):
        """The function `name` of ppo_ext or of the reference, with the options."""
        return functools.partial(getattr(library, name), **self.options)

    def forward(self, inputs, function):
        outputs = self.call(inputs, function)
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)

    def graph(self, inputs, function):
        """The inputs with new leaves among them, and the outputs, which hold the graph of the forward pass."""
        leaves = {name: inputs[name].detach().requires_grad_() for name in self.leaves}
        return {**inputs, **leaves, "outputs": self.forward({**inputs, **leaves}, function)}

    def gradients(self, graph, **options):
        outputs = graph["outputs"][: len(self.incoming) or 1]
        incoming = [graph[name].to(x.dtype) for name, x in zip(self.incoming, outputs)] or None
        return torch.autograd.grad(outputs, [graph[name] for name in self.leaves], incoming, **options)

    def results(self, pass_name, inputs, function):
        """What the pass computes: the outputs, the gradients, or the gradients and then the outputs."""
        if pass_name == FORWARD:
            return self.forward(inputs, function)
        graph = self.graph(inputs, function)
        gradients = self.gradients(graph)
        return gradients if pass_name == BACKWARD else (*gradients, *graph["outputs"])

    def implementation(self, pass_name, function, **more):
        """`function` in this pass. The backward pass alone is timed repeatedly on one graph, which is made outside the
        clock."""
        if pass_name != BACKWARD:
            return Implementation(lambda inputs: self.results(pass_name, inputs, function), **more)
        return Implementation(
            lambda graph: self.gradients(graph, retain_graph=True),
            prepare=lambda inputs: _kept(self.graph, inputs, function),
            **more,
        )


@dataclasses.dataclass(frozen=True)
class Operators:
    """The torch operators below an op, for bench_overhead.py. `forward(inputs)` returns their outputs, the first
    `results` of which are those of the op; `backward(inputs, outputs)` returns the gradient or the gradients. In
    `inputs` all tensors are contiguous, the mask is bool, `weights` is the mask as floats, and `one` is the incoming
    gradient of a loss."""

    forward: collections.abc.Callable
    results: int
    backward: collections.abc.Callable | None = None


def _kept(graph, inputs, function):
    with torch._functorch.config.patch(
        donated_buffer=False
    ):  # without this, torch.compile refuses a second backward pass
        return graph(inputs, function)
