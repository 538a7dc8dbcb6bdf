"""One step of growing a mixture: which components are drawn, what moves, and the coefficients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_recursive.bounds.mixture_objectives import OBJECTIVES, Objective, log_mixture, log_others
from pyro_recursive.losses.mixture import log_mixture_weights, whole_density
from pyro_recursive.tracing.densities import Densities, guide_group, weighted
from pyro_recursive.tracing.handlers import ComponentAssignment
from pyro_recursive.tracing.runs import ParticleRun
from pyro_recursive.tracing.sites import Site, sites

__all__ = ["MemberDraws", "StepPlan", "StepTerms", "component_site", "drawn", "terms_of"]


@dataclass(frozen=True)
class StepPlan:
    """What a step trains: ``component``, one of ``members``, by an objective; and the model.

    A component that is only ``proposing`` stands beside the mixture of the others, with the weight
    ``epsilon``.
    """

    objective: Objective
    members: tuple[int, ...]
    component: int
    num_draws: int
    moves_guide: bool = True
    moves_model: bool = True
    proposing: bool = False
    epsilon: float = 0.0

    @classmethod
    def on_all(cls, members: tuple[int, ...], num_draws: int) -> "StepPlan":
        """Return a focus that draws from all members and trains nothing."""
        return cls(OBJECTIVES["exact"], members, members[-1], num_draws, False)

    @property
    def place(self) -> int:
        """The column of the component among the members."""
        return self.members.index(self.component)

    @property
    def moves_weights(self) -> bool:
        """Whether the component's weight is learned in this step."""
        return self.moves_guide and not self.proposing and len(self.members) > 1

    @cached_property
    def components(self) -> tuple[int, ...]:
        """The column of every draw: of the component alone where nothing else is asked for."""
        if not (self.moves_model or self.moves_weights):
            return (self.place,) * self.num_draws
        return tuple(range(len(self.members))) * self.num_draws

    @cached_property
    def assignment(self) -> ComponentAssignment:
        """The handler for this step's runs, which also keeps the table of densities."""
        moving = {self.place} if self.moves_guide else set()
        frozen = frozenset(range(len(self.members))) - moving
        return ComponentAssignment(self.components, self.reference, frozen, members=self.members)

    @cached_property
    def tables(self) -> dict[int | None, tuple[Tensor, Tensor]]:
        """The table and log-weights of each run, as they were asked for."""
        return {}

    def reference(
        self, table: Tensor, log_weights: Tensor, volume: Tensor, particle: int | None
    ) -> Tensor:
        """Return the objective's reference density; see `tracing.handlers.Reference`."""
        # Kept as densities of the sites' values, which is what log p is.
        self.tables[particle] = (table - volume.unsqueeze(-1), log_weights)
        own = [draw for draw, column in enumerate(self.components) if column == self.place]
        log_weights = log_weights.detach()
        return self.objective(table, log_weights, self.place, own if particle is None else [])


class StepTerms(NamedTuple):
    """The parts of a step's gradient; ``[E, *plates]`` for E draws.

    ``model`` and ``guide`` multiply the gradients that model and component get from each draw,
    ``weights`` (with their graph) are the mixture's; ``gains`` are ``log p - log Q``; ``value`` is
    the bound.
    """

    local: Densities
    model: Tensor
    guide: Tensor
    weights: Tensor
    gains: Tensor
    value: Tensor

    def climbers(self, focus: StepPlan) -> list[Tensor]:
        """Return the weights of the draws for those that this step moves, the model's first."""
        moved = ((self.model, focus.moves_model), (self.guide, focus.moves_guide))
        return [weights for weights, moves in moved if moves]


def terms_of(runs: Sequence[ParticleRun], densities: Densities, focus: StepPlan) -> StepTerms:
    """Return the parts of a step's gradient."""
    local = whole_density(densities)
    count = len(set(focus.components))
    shape = (len(focus.components), *local.layout.shape)
    weights = (count * log_mixture_weights(densities)[:, 0].exp()).expand(shape)
    own = torch.tensor([float(column == focus.place) for column in focus.components])
    own = own.to(weights, non_blocking=True).reshape(-1, *[1] * (weights.dim() - 1)).expand(shape)
    zero = torch.zeros_like(own)
    model = zero
    if focus.moves_model:
        model = weights.detach()
        if focus.proposing:
            model = model * (1 - own) / (1 - focus.epsilon)
    log_q = _gather(runs, densities, focus, _mixture_in(focus))
    gains = (_model(densities, log_q) - log_q).detach()[:, 0].expand(shape)
    if focus.moves_model:
        value = (model * gains).mean(0).sum()
    else:
        value = (local.log_weights[:, 0] * own).sum() / focus.num_draws
    guide = zero
    if focus.moves_guide:
        guide = count * own
        if focus.objective.held:  # rows count as much as the component weighs in them
            share = own * weights.detach()
            guide = guide * share / (share.sum() / own.sum())
    return StepTerms(local, model, guide, weights, gains, value)


class MemberDraws(NamedTuple):
    """Draws from every member, and densities there.

    ``log_p``, the mixture's ``log_q``, that of the ``others`` without the last member, and the
    last member's ``own``, are ``[S, J, *rows]``, with the scales that a user put on them; ``table``
    ``[S, J, *rows, J]`` is without, ``log_weights`` ``[*rows, J]``.
    """

    log_p: Tensor
    log_q: Tensor
    others: Tensor
    own: Tensor
    table: Tensor
    log_weights: Tensor
    scale: float


def drawn(runs: Sequence[ParticleRun], densities: Densities, focus: StepPlan) -> MemberDraws:
    """Return the log-densities of all members at the draws of each."""
    count, layout = len(focus.members), densities.layout
    last = count - 1

    def gathered(log_density: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return _gather(runs, densities, focus, log_density)[:, 0].unflatten(0, (-1, count))

    log_q = gathered(log_mixture)
    log_p = _model(densities, densities.log_weights).expand_as(densities.log_weights)
    weights = log_mixture_weights(densities)[:count, 0].movedim(0, -1)
    return MemberDraws(
        log_p=log_p[:, 0].unflatten(0, (-1, count)),
        log_q=log_q,
        others=gathered(lambda table, weights: log_others(table, weights, last)),
        own=gathered(_column(last)),
        table=torch.stack([gathered(_column(j)) for j in range(count)], -1),
        log_weights=weights.expand(*layout.shape, count),
        scale=layout.scale,
    )


def _model(densities: Densities, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if densities.model is None else densities.model


def _mixture_in(focus: StepPlan) -> Callable[[Tensor, Tensor], Tensor]:
    """Return how the log-density of the mixture follows from the table."""
    if focus.proposing:
        return lambda table, log_weights: log_others(table, log_weights, focus.place)
    return log_mixture


def _column(j: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda table, log_weights: table[..., j]


def _gather(
    runs: Sequence[ParticleRun],
    densities: Densities,
    focus: StepPlan,
    log_density: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return a log-density computed from the tables, ``[E, 1, *plates]``."""
    looped = densities.layout.particles.dim is None
    rows = []
    for number, run in enumerate(runs):
        table, log_weights = focus.tables[number if looped else None]
        site = component_site(run)
        found = weighted(log_density(table, log_weights), site, densities.layout)
        rows.append([(site, found)])
    gathered = densities.layout.gather(rows)
    assert gathered is not None
    return gathered


def component_site(run: ParticleRun) -> Site:
    """Return the site that draws the component."""
    return next(site for site in sites(run.guide) if guide_group(site) == "score")
