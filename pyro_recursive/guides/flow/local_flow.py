"""Flows whose networks, too, are a row's own: for the best flow that a row could have."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pyro_recursive.guides.flow.zuko_adapter import AffineFlow
from pyro_recursive.guides.row_families import START, RowFamily

__all__ = ["LocalFlowRows"]

# The unit of the networks' parameters: a step for a place or a log-scale is a long one for them.
UNIT = 0.2


@dataclass(frozen=True)
class LocalFlowRows(RowFamily):
    """Flows of one architecture: context, location, log-scale, and all that its networks have.

    The networks' numbers are distances from the parameters of ``flow``, in units of 0.2, so that
    zeros are its own.
    """

    flow: AffineFlow
    size: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """The context, if any, locations, logarithms of scales, and the networks' parameters."""
        linear = self.flow.linear
        context = () if linear is None else (linear.in_features,)
        return (*context, self.size, self.size, sum(p.numel() for _, p in self._parameters))

    @property
    def noise_dim(self) -> int:
        """D."""
        return self.size

    @cached_property
    def _parameters(self) -> list[tuple[str, Tensor]]:
        return [(name, p.detach()) for name, p in self.flow.flow.named_parameters()]

    def draw(self, numbers: Tensor, noise: Tensor) -> Tensor:
        """Push the noise of each row through its flow."""
        return self.scored_draw(numbers, noise)[0]

    def scored_draw(self, numbers: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return draws and the log-density that came with them."""
        return self._each(_push, numbers, noise, (-2, -1))

    def log_prob(self, numbers: Tensor, u: Tensor) -> Tensor:
        """Return the log-density of each row's flow."""
        return self._each(_score, numbers, u, -1)

    def distribution(self, numbers: Tensor) -> Any:
        """Raise: rows with networks of their own are no batch of one flow."""
        raise NotImplementedError("Flows with networks of their own for each row are no batch.")

    def start(self, loc: Tensor) -> Tensor:
        """Return a context of zeros, a place, the scale of a start, and the flow's networks."""
        *context, _, _, networks = self.blocks
        zeros = partial(loc.new_zeros, *loc.shape[:-1])
        scale = torch.full_like(loc, START).log()
        return torch.cat([zeros(sum(context)), loc, scale, zeros(networks)], -1)

    def _each(self, run: Callable, numbers: Tensor, values: Tensor, out_dims: Any) -> Any:
        """Run all rows at once: ``[*batch, P]`` and ``[*s, *batch, D]``."""
        batch = numbers.shape[:-1]
        flat = values.reshape(*values.shape[: values.dim() - 1 - len(batch)], -1, self.size)
        one = partial(self._one, run)
        with pyro.settings.context(validate_distributions_torch=False):  # it asks for values
            found = vmap(one, (0, -2), out_dims)(numbers.reshape(-1, numbers.shape[-1]), flat)
        if isinstance(found, Tensor):
            return found.reshape(values.shape[:-1])
        return found[0].reshape(values.shape), found[1].reshape(values.shape[:-1])

    def _one(self, run: Callable, numbers: Tensor, values: Tensor) -> Any:
        *context, size, _, networks = self.blocks
        given, head, rest = numbers.split([sum(context), 2 * size, networks])
        names, own = zip(*self._parameters, strict=True)
        moved = rest.split([p.numel() for p in own])
        pairs = zip(names, own, moved, strict=True)
        parameters = {f"flow.flow.{name}": p + UNIT * by.view_as(p) for name, p, by in pairs}
        inputs = (run, given if context else None, head, values)
        return functional_call(_Built(self.flow), parameters, inputs)


class _Built(nn.Module):
    """Builds a flow and runs something with it: networks run late, and must be a row's by then."""

    def __init__(self, flow: AffineFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, run: Callable, context: Tensor | None, head: Tensor, values: Tensor) -> Any:
        """Run it."""
        return run(self.flow.at(context, head, torch.Size()), values)


def _push(flow: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    u = flow.push(noise)
    return u, flow.log_prob(u)


def _score(flow: Any, u: Tensor) -> Tensor:
    return flow.flow.log_prob(u)
