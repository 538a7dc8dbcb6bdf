"""Which component of a mixture guide each particle comes from: asked by guides, set by losses.

A mixture guide draws its components at random. A stratified loss takes each of them equally often
and weighs what it gets, so that weights and components have gradients without the noise of the
draw. The guide asks with `current_strata`; the loss answers with the handler `ComponentAssignment`.
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor

__all__ = ["ComponentAssignment", "ComponentIndex", "Reference", "current_strata"]

# (log q_j(u) of every component, log weights, [*batch, J] both; log |dz / du|, [*batch]; the number
# of the run where runs are looped, None for one pass) -> log-density of u, [*batch]
Reference = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


class ComponentIndex(dist.Categorical):
    """Which component of a mixture a row is drawn from.

    The mixture's whole density stands at the latent sites, at whatever component: the choice adds
    nothing to it, so that `pyro.infer.Trace_ELBO`, which leaves auxiliary sites out of its rewards,
    is unbiased. It has a score function all the same.
    """

    def log_choice(self, value: Tensor) -> Tensor:
        """Return the logarithm of the weight of the component chosen."""
        return super().log_prob(value)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(self.log_choice(value))

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Return the weight's logarithm as score function, and nothing else."""
        score = self.log_choice(x)
        return ScoreParts(torch.zeros_like(score), score, 0)


class ComponentAssignment(Messenger):
    """Gives each particle a component of every mixture guide that runs under it.

    Components are counted among ``members``, those that make up the mixture in this run.

    Arguments:
        components: the component of each particle, the same for all rows.
        reference: what the guide reports in place of the mixture's log-density, if anything.
        frozen: the components whose parameters are constants of this run.
        points: packed unconstrained vectors ``[*batch, D]`` to sample in place of draws.
        members: the numbers of the guide's components that make up the mixture, None for its own.
        hold: whether parameters inside the densities, not those of the draws, are constants; only
            for guides that can (``holds_densities``).
    """

    def __init__(
        self,
        components: tuple[int, ...],
        reference: Reference | None = None,
        frozen: frozenset[int] = frozenset(),
        points: Tensor | None = None,
        members: tuple[int, ...] | None = None,
        hold: bool = False,
    ) -> None:
        super().__init__()
        self.components, self.reference = components, reference
        self.frozen, self.points, self.members = frozen, points, members
        self.hold = hold
        self.particle: int | None = None  # which one this run is for, where runs are looped

    def points_of(self, shape: torch.Size) -> Tensor:
        """Return the points of this run, ``[*batch, D]`` for a batch shape."""
        assert self.points is not None
        points = self.points if self.particle is None else self.points[self.particle]
        return points.reshape(*shape, points.shape[-1])

    def _pyro_strata(self, msg: Any) -> None:
        msg["value"], msg["done"] = self, True


@effectful(type="strata")
def current_strata() -> ComponentAssignment | None:
    """Return the strata of this run, None where components are drawn at random."""
    return None
