"""Where a new component with free parameters starts: where it would gain most."""

import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from pyro_recursive.bounds.missing_mass import missing_gaussians
from pyro_recursive.bounds.mixture_objectives import best_gain, log_mixture
from pyro_recursive.losses.mixture import density_weight
from pyro_recursive.tracing import batched
from pyro_recursive.tracing.choice import brief
from pyro_recursive.tracing.densities import densities
from pyro_recursive.tracing.handlers import ComponentAssignment, FlatPriors
from pyro_recursive.tracing.plates import layout_of
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.protocols import FreeComponent, GrowingMixture
from pyro_recursive.tracing.runs import particles_of, run_particles
from pyro_recursive.tracing.sites import subsample_scale, subsample_sites

WIDENING = 3.0
SCALES = (0.25, 0.5, 1.0)  # of the mixture's
CHUNK = 2000  # points evaluated in one pass

logger = logging.getLogger(__name__)


class Effort(NamedTuple):
    """How much a search evaluates.

    ``points``: half from the mixture, widened, half from the prior. ``locations`` of candidates:
    half of them the best points in log p - log Q, half random ones. ``draws`` of each candidate:
    with few, the largest estimate is mostly noise.
    """

    points: int
    locations: int
    draws: int

    @property
    def num_runs(self) -> int:
        """How often the model is evaluated."""
        return 2 * self.points + self.draws * (1 + len(SCALES) * self.locations)


IN_ONE_PASS = Effort(points=1000, locations=48, draws=64)
WEIGHED = Effort(points=4000, locations=48, draws=64)  # draws of the mixture have weights, too
COMPARED = 500  # draws of the mixture for each candidate, where they have weights
GAUSSIANS = 16  # where weights say that mass is missing
LOOPED = Effort(points=200, locations=12, draws=16)  # 1,000 runs of the model


@torch.no_grad()
def place_component(
    program: Program, mixture: GrowingMixture, *, vectorize: bool | str = True
) -> None:
    """Start the proposed component where it would gain most, among isotropic candidates.

    Where it ``starts_by_weights`` there are others, Gaussians by importance weights of draws of the
    mixture. Only Gaussians with parameters of their own have a start; encoders keep their initial
    weights. Where rows are a minibatch, every row starts at random around the first component, as
    the rows outside of the minibatch have no candidates. A user's scales are left out. Runs of the
    model are fewer where they are looped; the logger of this module reports a search at level INFO.
    """
    component = mixture.free_component()
    number = mixture.stage.component
    if component is None:
        logger.info("Component %s starts from its initial weights.", number)
        return
    if any(subsample_scale(frame) != 1 for frame in component.rows):
        logger.info("Component %s starts at random: the rows are a minibatch.", number)
        component.scatter(WIDENING)
        return
    looped = particles_of(program, 1, LOOPED.num_runs, vectorize).dim is None
    is_weighed = not looped and component.starts_by_weights
    effort = LOOPED if looped else WEIGHED if is_weighed else IN_ONE_PASS
    search = _Search(program, mixture, component, vectorize, effort)
    how = "one by one" if looped else "many in one pass"
    logger.info("Component %s: %d runs of the model, %s.", number, search.effort.num_runs, how)
    own = search.points_of_guide()
    drawn = search.weighed(own if is_weighed else own[: effort.draws])
    if is_weighed:
        mixture.end_if_complete(drawn.log_p - drawn.log_q)
        if not mixture.starts_component:
            return
    centers = search.locations(own, search.points_of_prior())
    locs = centers.repeat(len(SCALES), *[1] * (centers.dim() - 1))
    factors = torch.tensor(SCALES).to(locs).repeat_interleave(len(centers))
    scales = factors.reshape(-1, *[1] * (locs.dim() - 1)) * _spread(own)
    compared = Weighed(*(each[:COMPARED] for each in drawn))
    bound, best = search.best(compared, Independent(Normal(locs, scales), 1))
    found = missing_gaussians(*drawn, GAUSSIANS) if is_weighed else None
    if found is not None:
        loc, scale_tril = found
        other, index = search.best(compared, MultivariateNormal(loc, scale_tril=scale_tril))
        if bool(other > bound):
            component.place_gaussian(loc[index], scale_tril[index])
            return
    index = best.reshape(1, *best.shape, 1).expand(1, *locs.shape[1:])
    component.place(locs.gather(0, index)[0], scales.gather(0, index)[0])


def _spread(points: Tensor) -> Tensor:
    """Return the standard deviations of points, at least the rounding error of their values."""
    limits = torch.finfo(points.dtype)
    smallest = (limits.eps * points.abs().amax(0)).clamp_min(limits.tiny**0.5)
    return torch.maximum(points.std(0), smallest)


class Weighed(NamedTuple):
    """Points ``[T, *rows, D]`` with log p and log Q, ``[T, *rows]`` both."""

    points: Tensor
    log_p: Tensor
    log_q: Tensor


@dataclass
class _Search:
    """Evaluates candidates under the model in one pass; each row has its own candidates.

    Points are packed and unconstrained, ``[points, *rows, D]``.
    """

    program: Program
    mixture: GrowingMixture
    component: FreeComponent
    vectorize: bool | str
    effort: Effort

    def points_of_guide(self) -> Tensor:
        """Return draws of the mixture so far, and keep their minibatch for the other points."""
        self.particles, runs = run_particles(
            self.program, 1, self.effort.points // 2, vectorize=self.vectorize
        )
        self.minibatch = subsample_sites(runs[0].guide, runs[0].model)
        return torch.cat([self.component.pack(run.guide) for run in runs])

    def points_of_prior(self) -> Tensor:
        args, kwargs, total = self.program.args, self.program.kwargs, self.particles.total
        model = poutine.trace(poutine.block(self.program.model, hide_types=["param"]))

        def draw() -> Tensor:
            return self.component.pack(model.get_trace(*args, **kwargs))

        flat = FlatPriors(scale=1.0)
        if self.particles.vmap:
            try:
                return batched.draw(flat(draw), total).flatten(0, 1)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # not every distribution can be drawn so
                logger.info("Draws of the prior run one by one: %s.", brief(error))
        elif self.particles.dim is not None:
            with flat, self.particles.plate():
                return draw()
        return torch.cat([flat(draw)() for _ in range(total)])

    def locations(self, own: Tensor, prior: Tensor) -> Tensor:
        """Return locations for candidates: where log p - log Q is largest, and random points."""
        count = self.effort.locations
        center = own.mean(0, keepdim=True)
        points = torch.cat([center + WIDENING * (own - center), prior])
        log_p, log_q = self.evaluate(points)
        # Far below the largest log p a large ratio only says that Q has thin tails.
        far = log_p < log_p.amax(0) - (5.0 + self.component.size / 2)
        ranked = (log_p - log_q).masked_fill(far, -torch.inf).topk(count // 2, 0).indices
        best = points.gather(0, ranked.unsqueeze(-1).expand(-1, *points.shape[1:]))
        anywhere = torch.randperm(len(points), device=points.device)[: count - len(best)]
        return torch.cat([best, points[anywhere]])

    def weighed(self, points: Tensor) -> "Weighed":
        """Return points with log p and log Q there."""
        return Weighed(points, *self.evaluate(points))

    def best(self, own: "Weighed", candidates: Distribution) -> tuple[Tensor, Tensor]:
        """Return gain and index of the best of C candidates for each row, ``[*rows]`` both.

        ``own`` are draws of the mixture; candidates have the batch ``[C, *rows]``.
        """
        draws = candidates.sample((self.effort.draws,)).movedim(0, 1)
        values = self.evaluate(draws.flatten(0, 1))
        log_p, log_q = (each.unflatten(0, draws.shape[:2]) for each in values)
        return best_gain(
            log_p=(own.log_p, log_p),
            log_mixture=(own.log_q, log_q),
            log_candidate=(
                candidates.log_prob(own.points.unsqueeze(1)).movedim(0, 1),
                candidates.log_prob(draws.movedim(0, 1)).movedim(0, 1),
            ),
        )

    def evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p and log Q of points, ``[points, *rows]``; -inf for what is not finite.

        Where the latents' densities have a weight, log p is divided by it: the bound has the
        optimum of one without it.
        """
        parts = [self._evaluate(chunk) for chunk in points.split(CHUNK)]
        log_p, log_q = (torch.cat(column) for column in zip(*parts, strict=True))
        return torch.where(log_p.isfinite(), log_p, -torch.inf), log_q

    def _evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        log_q: dict[int | None, Tensor] = {}  # by run

        def record(table: Tensor, log_weights: Tensor, volume: Tensor, run: int | None) -> Tensor:
            if not run:  # the first of a pass; one that failed is not counted
                log_q.clear()
            log_q[run] = log_mixture(table, log_weights)
            return torch.zeros_like(volume)

        components, members = (0,) * len(points), self.mixture.members
        particles, runs = run_particles(
            self.program,
            1,
            len(points),
            vectorize=self.vectorize,
            subsample=self.minibatch,
            assignment=ComponentAssignment(components, record, points=points, members=members),
        )
        layout = layout_of(particles, [run.table for run in runs])
        log_p, weight = densities(runs, layout).log_weights[0], density_weight(runs, layout)[0]
        log_p = torch.where(weight > 0, log_p / weight, log_p)  # 0 where it is masked
        return log_p, torch.stack(list(log_q.values())).reshape(log_p.shape)
