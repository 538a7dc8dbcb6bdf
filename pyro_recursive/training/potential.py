"""Minus the log-density of a model and its gradient, one point at a time, as samplers need them.

A run of a model takes milliseconds whatever the data, most of them in Python. Here a run is traced
to a graph of tensor operations, forward and backward, which calls go through instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_recursive.guides.log_density import LogDensity
from pyro_recursive.tracing.graphs.kernels import compile_graph
from pyro_recursive.tracing.graphs.run_graph import recorded, trace_run
from pyro_recursive.tracing.graphs.unsupported import Unsupported, as_unsupported
from pyro_recursive.tracing.program import FAILURES

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]  # [D] to a value and [D]

STEPS = (0.0, 0.1)  # to points where a graph is compared with a run
TOLERANCE = 1e-6  # relative, of values and gradients; float32 has 1000 times that


class Potential:
    """``-log p`` at a point ``[D]``, with its gradient; ``num_gradients`` counts calls.

    In nats. Where the model fails, or has the density 0, it is infinite. With ``compile`` the graph
    is made machine code, which takes seconds.
    """

    def __init__(self, density: LogDensity, start: Tensor, *, compile: bool = False) -> None:
        self.density, self.num_gradients = density, 0
        self.gradient: Gradient = self._run
        try:
            graph = _graph_of(density, start, compile)
        except Unsupported:
            return
        if all(_agree(graph, self._run, start + step) for step in STEPS):
            self.gradient = graph

    @property
    def is_traced(self) -> bool:
        """Whether calls go through a graph."""
        return self.gradient != self._run

    def __call__(self, u: Tensor) -> Tensor:
        self.num_gradients += 1
        return _Value.apply(u, self._negative)

    def _negative(self, u: Tensor) -> tuple[Tensor, Tensor]:
        try:
            value, grad = self.gradient(u)
        except FAILURES:
            return u.new_full((), torch.inf), torch.zeros_like(u)
        return -value, -grad

    def _run(self, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():  # inside of an autograd function there are none
            value, grad = self.density.gradient(u[None])
        return value[0], grad[0]


class _Value(torch.autograd.Function):
    """A value whose gradient was computed with it."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, gradient: Gradient) -> Tensor:
        value, grad = gradient(u.detach())
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None]:
        return factor * ctx.saved_tensors[0], None


def _graph_of(density: LogDensity, start: Tensor, compile: bool) -> Gradient:
    """Return the density and its gradient as a graph. Raises Unsupported."""
    point = start.detach().clone()[None]

    def run() -> list[Tensor]:
        return [*density.gradient(point)]

    with as_unsupported():
        recorder, _ = recorded(run)
        traced = trace_run(run, recorder, [point], 1, lambda: None)
        own = [row[0] for row in traced.plan.empty(1)]
        own += [constant.detach() for constant in traced.constants]
        graph = compile_graph(traced.graph, [point, *own]) if compile else traced.graph

    @torch.no_grad()
    def gradient(u: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = graph(u[None], *own)
        return value[0], grad[0]

    return gradient


def _agree(graph: Gradient, run: Gradient, u: Tensor) -> bool:
    """Whether a graph has the value and the gradient of a run, if that has them."""
    try:
        expected = run(u)
        found = graph(u)
    except FAILURES:
        return False
    tolerance = TOLERANCE * (1e3 if u.dtype is torch.float32 else 1.0)
    return all(
        torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        for one, other in zip(found, expected, strict=True)
    )
