"""The passes of an op: forward, backward alone, and both; what of each is timed, and what of it is checked."""

import collections.abc
import dataclasses

import torch

from .suite import Implementation

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


@dataclasses.dataclass(frozen=True)
class Op:
    """`call(inputs, function)` gives the output, or several, of a function of this op. `leaves` names the inputs that
    get a gradient, `incoming` the gradients that come in, one for each output; without any, the first output is a loss."""

    call: collections.abc.Callable
    leaves: tuple = ()
    incoming: tuple = ()

    def forward(self, inputs, function):
        outputs = self.call(inputs, function)
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)

    def graph(self, inputs, function):
        """The inputs, with fresh leaves among them and the outputs that hold their graph."""
        leaves = {name: inputs[name].detach().requires_grad_() for name in self.leaves}
        return {**inputs, **leaves, "outputs": self.forward({**inputs, **leaves}, function)}

    def gradients(self, graph, **options):
        outputs = graph["outputs"][: len(self.incoming) or 1]
        incoming = [graph[name].to(x.dtype) for name, x in zip(self.incoming, outputs)] or None
        return torch.autograd.grad(outputs, [graph[name] for name in self.leaves], incoming, **options)

    def results(self, pass_name, inputs, function):
        """What `pass_name` computes: the outputs, the gradients, or the gradients and the outputs."""
        if pass_name == FORWARD:
            return self.forward(inputs, function)
        graph = self.graph(inputs, function)
        gradients = self.gradients(graph)
        return gradients if pass_name == BACKWARD else (*gradients, *graph["outputs"])

    def implementation(self, pass_name, function, **more):
        """`function` in this pass. The backward pass alone runs over and over on a graph from outside the clock."""
        if pass_name != BACKWARD:
            return Implementation(lambda inputs: self.results(pass_name, inputs, function), **more)
        return Implementation(
            lambda graph: self.gradients(graph, retain_graph=True),
            prepare=lambda inputs: _kept(self.graph, inputs, function),
            **more,
        )


def _kept(graph, inputs, function):
    with torch._functorch.config.patch(donated_buffer=False):  # else torch.compile refuses a second backward pass
        return graph(inputs, function)
