"""Values cut out of the graph: a sample, and a stand-in that the replayed programs see.

The gradient that arrives at the stand-in goes on to the sample multiplied by a factor that is known
only after the forward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.tracing.sites import Site

__all__ = ["GradientCut", "cut"]


class GradientCut:
    """One guide value cut in two: `value` has the guide's graph, `stand_in` is what is replayed."""

    def __init__(self, site: Site, particle: int) -> None:
        self.site, self.particle = site, particle
        self.value: Tensor = site["value"]
        self._factor: list[Tensor] = []
        self.stand_in: Tensor = _ScaleGradient.apply(self.value, self._factor)

    def scale_gradient(self, factor: Tensor) -> None:
        """Set what multiplies the gradient on its way from the stand-in to the value."""
        self._factor[:] = [factor]


class _ScaleGradient(torch.autograd.Function):
    """The identity; its backward pass multiplies by a tensor that is filled in later."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: list[Tensor]) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor[0], None


def cut(particle: int, paths: list[GradientCut]) -> Callable[[Site], Tensor]:
    """Return a function that cuts a site's value and keeps the `GradientCut`."""

    def stand_in(site: Site) -> Tensor:
        if not site["value"].requires_grad:
            return site["value"]
        paths.append(GradientCut(site, particle))
        return paths[-1].stand_in

    return stand_in
