"""Where a new component with free parameters starts: where it would gain most."""

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.bounds.mixture_objectives import best_gain, log_mixture
from pyro_recursive.tracing.densities import densities
from pyro_recursive.tracing.handlers import ComponentAssignment
from pyro_recursive.tracing.plates import layout_of
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import run_particles
from pyro_recursive.tracing.sites import PARTICLE_PLATE, subsample_scale, subsample_sites

__all__ = ["propose"]

SCREENED = 1000  # half from the mixture, widened, half from the prior
PLACES = 48  # half of them the best of these in log p - log Q, half any of them
WIDENING = 3.0
SCALES = (0.25, 0.5, 1.0)  # of the mixture's
DRAWS = 64  # from each candidate: with fewer, the best estimate is a lucky one
CHUNK = 2000  # points evaluated in one pass


@torch.no_grad()
def propose(program: Program, mixture: Any, *, vectorize: bool = True) -> None:
    """Put the component of this stage where it would gain most, among isotropic candidates.

    Only for Gaussians with parameters of their own: an encoder starts where its weights say. Where
    rows are a minibatch, all of them start at random around the first component, as the others'
    candidates cannot be judged. A user's scales are left out of the search.
    """
    component = mixture.free_component(mixture.stage.component)
    if component is None or len(mixture.groups) != 1:
        return
    (latents,) = mixture.groups
    if any(subsample_scale(frame) != 1 for frame in latents.rows):
        component.scatter(latents, mixture.component(0), WIDENING)
        return
    search = _Search(program, mixture, latents, vectorize)
    own = search.points(search.from_guide())
    places = search.screened(own, search.points(search.from_prior()))
    locs = places.repeat(len(SCALES), *[1] * (places.dim() - 1))
    factors = torch.tensor(SCALES).to(locs).repeat_interleave(len(places))
    scales = factors.reshape(-1, *[1] * (locs.dim() - 1)) * own.std(0)
    best = search.best(own[:DRAWS], locs, scales)
    chosen = best.reshape(1, *best.shape, 1).expand(1, *locs.shape[1:])
    component.restart(latents, locs.gather(0, chosen)[0], scales.gather(0, chosen)[0])


class _Search:
    """Evaluates candidates under the model, all in one pass; rows have candidates of their own."""

    def __init__(self, program: Program, mixture: Any, latents: Any, vectorize: bool) -> None:
        self.program, self.mixture, self.latents = program, mixture, latents
        self.vectorize = vectorize

    def from_guide(self) -> list[poutine.Trace]:
        """Run the mixture so far."""
        self.particles, runs = run_particles(
            self.program, 1, SCREENED // 2, vectorize=self.vectorize
        )
        self.minibatch = subsample_sites(runs[0].guide, runs[0].model)
        return [run.guide for run in runs]

    def from_prior(self) -> list[poutine.Trace]:
        """Run the model on its prior, in one pass or one by one."""
        program, particles = self.program, self.particles
        model = poutine.trace(poutine.block(program.model, hide_types=["param"]))
        if particles.dim is None:
            runs = range(particles.total)
            return [model.get_trace(*program.args, **program.kwargs) for _ in runs]
        with pyro.plate(PARTICLE_PLATE, particles.total, dim=particles.dim):
            return [model.get_trace(*program.args, **program.kwargs)]

    def points(self, traces: list[poutine.Trace]) -> Tensor:
        """Return the packed latents of traces, ``[particles, *rows, D]``."""
        rows = [frame.size for frame in self.latents.rows]
        packed = []
        for trace in traces:
            values = {slot.name: trace.nodes[slot.name]["value"] for slot in self.latents.slots}
            packed.append(self.latents.pack(values).reshape(-1, *rows, self.latents.size))
        return torch.cat(packed)

    def screened(self, own: Tensor, prior: Tensor) -> Tensor:
        """Return places for candidates: where the mixture is missing, and anywhere."""
        centre = own.mean(0, keepdim=True)
        points = torch.cat([centre + WIDENING * (own - centre), prior])
        log_p, log_q = self.evaluate(points)
        # Far below the best in log p the ratio says no more than that Q has thin tails.
        far = log_p < log_p.amax(0) - (5.0 + self.latents.size / 2)
        ranked = (log_p - log_q).masked_fill(far, -torch.inf).topk(PLACES // 2, 0).indices
        best = points.gather(0, ranked.unsqueeze(-1).expand(-1, *points.shape[1:]))
        anywhere = torch.randperm(len(points), device=points.device)[: PLACES - len(best)]
        return torch.cat([best, points[anywhere]])

    def best(self, own: Tensor, locs: Tensor, scales: Tensor) -> Tensor:
        """Return the number of the best of C candidates for each row, ``[*rows]``."""
        noise = torch.randn(len(locs), DRAWS, *locs.shape[1:]).to(locs)
        draws = locs.unsqueeze(1) + scales.unsqueeze(1) * noise
        log_p, log_q = self.evaluate(torch.cat([own, draws.flatten(0, 1)]))
        count = len(own)
        shape = (len(locs), DRAWS)
        return best_gain(
            log_p=(log_p[:count], log_p[count:].unflatten(0, shape)),
            log_mixture=(log_q[:count], log_q[count:].unflatten(0, shape)),
            log_candidate=(_normal(own, locs, scales), _normal(draws, locs, scales)),
        )

    def evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the model's and the mixture's log-density of points, ``[count, *rows]``.

        Of the unconstrained points: the model's has the Jacobians of constrained supports.
        """
        parts = [self._evaluate(chunk) for chunk in points.split(CHUNK)]
        log_p, log_q = (torch.cat(column) for column in zip(*parts, strict=True))
        return log_p.nan_to_num(nan=-torch.inf), log_q  # where the model overflows, nothing is

    def _evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        seen: dict[int | None, Tensor] = {}  # by run

        def nothing(table: Tensor, log_weights: Tensor, volume: Tensor, run: int | None) -> Tensor:
            seen[run] = log_mixture(table, log_weights)
            return torch.zeros_like(volume)

        assignment = ComponentAssignment(
            (0,) * len(points), nothing, points=points, members=self.mixture.members
        )
        particles, runs = run_particles(
            self.program,
            1,
            len(points),
            vectorize=self.vectorize,
            assignment=assignment,
            subsample=self.minibatch,
        )
        log_p = densities(runs, layout_of(particles, [run.table for run in runs])).log_weights[0]
        return log_p, torch.stack(list(seen.values())).reshape(log_p.shape)


def _normal(points: Tensor, locs: Tensor, scales: Tensor) -> Tensor:
    """Return candidates' log-densities: at own draws, ``[C, S, *rows]``, or at shared points."""
    locs, scales = locs.unsqueeze(1), scales.unsqueeze(1)
    return torch.distributions.Normal(locs, scales).log_prob(points).sum(-1)
