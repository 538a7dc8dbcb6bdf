"""Mixtures of distributions over a packed vector: one draw by index, all densities at any point."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_recursive.guides.gaussian_families import Family
from pyro_recursive.guides.marginals import kept_log_density, log_density


class Mixture(TorchDistribution):
    """``Q(u) = sum_m w_m q_m(u)`` with weights ``[*batch, M]``, over vectors ``[D]``.

    Its log-density is always that of the whole mixture, never of the component drawn.
    """

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real_vector
    has_rsample = False  # the draw of a component has no derivative

    def __init__(self, log_weights: Tensor, batch_shape: torch.Size, size: int) -> None:
        self.log_weights = log_weights
        shape = torch.broadcast_shapes(log_weights.shape[:-1], batch_shape)
        super().__init__(shape, torch.Size([size]), validate_args=False)

    @property
    def num_components(self) -> int:
        """M."""
        return self.log_weights.shape[-1]

    @abstractmethod
    def table(self, u: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return every component's log-density: ``[*batch, D]`` to ``[*batch, M]``.

        With ``keep``, ``[*batch, D]``, of the entries that it flags.
        """

    @abstractmethod
    def draw(self, index: Tensor, present: Sequence[int] | None = None) -> Tensor:
        """Return a reparameterised draw from the component ``index`` of each row.

        ``[*batch]`` to ``[*batch, D]``; ``present`` are the components that occur, None for all.
        """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``log Q``, ``[*batch, D]`` to ``[*batch]``."""
        return torch.logsumexp(self.table(value) + self.log_weights, -1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw components, then vectors; without a gradient."""
        with torch.no_grad():
            shape = (*sample_shape, *self.batch_shape)
            weights = self.log_weights.exp().expand(*shape, -1)
            index = torch.multinomial(weights.reshape(-1, self.num_components), 1)
            return self.draw(index.reshape(shape))


@kept_log_density.register
def _mixture(distribution: Mixture, u: Tensor, keep: Tensor) -> Tensor:
    return torch.logsumexp(distribution.table(u, keep) + distribution.log_weights, -1)


class ListMixture(Mixture):
    """A mixture of any distributions, evaluated one by one."""

    def __init__(self, log_weights: Tensor, components: Sequence[Any]) -> None:
        self.components = list(components)
        shape = torch.broadcast_shapes(*(c.batch_shape for c in components))
        super().__init__(log_weights, shape, components[0].event_shape[0])

    def table(self, u: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return every component's log-density, ``[*batch, M]``."""
        return torch.stack([log_density(each, u, keep) for each in self.components], -1)

    def draw(self, index: Tensor, present: Sequence[int] | None = None) -> Tensor:
        """Draw from each component that may occur, and choose."""
        if present is not None and len(set(present)) == 1:
            return self.components[present[0]].expand(index.shape).rsample()
        draws = [component.expand(index.shape).rsample() for component in self.components]
        return _chosen(torch.stack(draws), index)


class StackedMixture(Mixture):
    """A mixture of one family's members: ``parameters`` are ``[M, *batch, num_parameters]``."""

    def __init__(self, log_weights: Tensor, parameters: Tensor, family: Family, size: int) -> None:
        self.parameters, self.family = parameters, family
        super().__init__(log_weights, parameters.shape[1:-1], size)

    def held(self) -> "StackedMixture":
        """Return the same mixture with constant parameters."""
        weights, parameters = self.log_weights.detach(), self.parameters.detach()
        return StackedMixture(weights, parameters, self.family, self.event_shape[0])

    def table(self, u: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return every component's log-density at once, ``[*batch, M]``."""
        components = self.family(self._parameters(u.dim() - 1), self.event_shape[0])
        return log_density(components, u, keep).movedim(0, -1)

    def draw(self, index: Tensor, present: Sequence[int] | None = None) -> Tensor:
        """Draw once, with the parameters of the chosen components."""
        parameters = self._parameters(index.dim())
        if present is not None and len(set(present)) == 1:
            chosen = parameters[present[0]].expand(*index.shape, -1)
        else:
            chosen = _chosen(parameters, index)
        return self.family(chosen, self.event_shape[0]).rsample()

    def _parameters(self, batch_dims: int) -> Tensor:
        """Return the parameters with so many dims between those of components and vectors."""
        count, *batch = self.parameters.shape
        return self.parameters.reshape(count, *[1] * (batch_dims + 1 - len(batch)), *batch)


def _chosen(stacked: Tensor, index: Tensor) -> Tensor:
    """Select by index: ``[M, *batch, n]`` and ``[*batch]`` to ``[*batch, n]``."""
    wide = stacked.expand(stacked.shape[0], *index.shape, stacked.shape[-1])
    return torch.gather(wide, 0, index[None, ..., None].expand(1, *wide.shape[1:]))[0]
