"""Runs of guide and model for all particles: one outer particle plate, or one by one."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_recursive.tracing.compatibility import check_match
from pyro_recursive.tracing.handlers import ComponentAssignment, DryRun
from pyro_recursive.tracing.isolation import ReplayedNoise, isolated
from pyro_recursive.tracing.plates import Particles
from pyro_recursive.tracing.program import Program, structure_of
from pyro_recursive.tracing.sites import (
    PARTICLE_PLATE,
    Site,
    SiteTable,
    is_delta,
    latent_sites,
    subsample_sites,
)


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


@dataclass
class ParticleRun:
    """One run of guide and model: all particles, or one of them where runs are looped.

    `guide_cuts` cut the guide's samples from its densities, `model_cuts` the guide from the model.
    """

    model: poutine.Trace
    guide: poutine.Trace
    table: SiteTable
    guide_cuts: list[GradientCut]
    model_cuts: list[GradientCut]


Replay = Literal["none", "paths", "values"]


def run_particles(
    program: Program,
    num_estimates: int,
    num_particles: int,
    *,
    max_plate_nesting: float = math.inf,
    vectorize: bool = True,
    **options: Any,
) -> tuple[Particles, list[ParticleRun]]:
    """Run guide and model for M * K samples, in one vectorised pass or one by one; see `_draw`."""
    if not vectorize or num_estimates * num_particles == 1:
        particles = Particles(num_estimates, num_particles)
        return particles, _draw(program, particles, **options)
    structure = structure_of(program)
    if structure.mixing is not None:
        with isolated(), DryRun():  # model and guide may not fit in a single run either
            guide = program.run_guide()
            check_match(SiteTable(program.run_model(guide), guide), structure.max_plate_nesting)
        raise ValueError(
            f"One sample's density depends on the value of '{structure.mixing}' in another. Count "
            "dims from the right (z.sum(-1)), or use vectorize_particles=False."
        )
    known = structure.max_plate_nesting
    assumed = known if math.isinf(max_plate_nesting) else int(max_plate_nesting)
    particles = Particles(num_estimates, num_particles, dim=-assumed - 1)
    try:
        runs = _draw(program, particles, **options)
        if runs[0].table.nesting <= assumed:
            return particles, runs
        problem: Exception = ValueError(f"a plate stands left of the particle plate at {-assumed}")
    except Exception as error:
        problem = error
    # Plates may depend on the arguments: look at this call's before giving up.
    nesting = structure_of(program, fresh=True).max_plate_nesting
    if nesting <= assumed:
        problem.add_note(
            f"All {particles.total} samples run in one pass, under one more plate on the left. "
            "Count dims from the right (b[..., group] for b[group], (x * z).sum(-1) for x @ z), "
            "or use vectorize_particles=False."
        )
        raise problem
    particles = Particles(num_estimates, num_particles, dim=-nesting - 1)
    return particles, _draw(program, particles, **options)


def _draw(
    program: Program,
    particles: Particles,
    *,
    replay: Replay = "none",
    cut_model: bool = False,
    shared: frozenset[str] = frozenset(),
    subsample: poutine.Trace | None = None,
    assignment: ComponentAssignment | None = None,
) -> list[ParticleRun]:
    """Run guide and model for all particles on one minibatch.

    ``replay="paths"`` runs the guide a second time on stand-ins of its reparameterised samples,
    ``"values"`` on detached samples; ``cut_model`` gives the model stand-ins of everything it takes
    from the guide. Sites in ``shared`` have one value for the K samples of an estimate. A trace
    of subsample sites fixes the minibatch; without one it is drawn here, once for all particles.
    ``assignment`` choose the components of mixture guides.
    """
    runs: list[ParticleRun] = []
    looped = particles.dim is None
    sharing = _ShareWithinEstimate(shared, particles) if shared else nullcontext()
    count = particles.num_estimates * particles.num_particles
    for particle in range(count if looped else 1):
        if isinstance(sharing, _ShareWithinEstimate):
            sharing.particle = particle
        if assignment is not None:
            assignment.particle = particle if looped else None
        noise = ReplayedNoise() if replay != "none" else nullcontext()
        plate: AbstractContextManager = nullcontext()
        if not looped:
            plate = pyro.plate(PARTICLE_PLATE, count, dim=particles.dim)
        cuts: list[GradientCut] = []
        model_cuts: list[GradientCut] = []
        with plate, assignment or nullcontext():
            with sharing, noise:
                guide = program.run_guide(subsample)
            if replay != "none":
                with noise:
                    guide = program.run_guide(_stand_ins(guide, particle, replay, cuts))
            source = guide if subsample is None and not cut_model else guide.copy()
            if cut_model:
                for site in latent_sites(guide):
                    source.nodes[site["name"]] = _cut(site, particle, model_cuts)
            for name, site in subsample.nodes.items() if subsample is not None else ():
                if name not in source.nodes:
                    source.add_node(name, **site)
            model = program.run_model(source)
        if subsample is None and looped:
            subsample = subsample_sites(guide, model)
        runs.append(ParticleRun(model, guide, SiteTable(model, guide), cuts, model_cuts))
    return runs


def _stand_ins(
    guide: poutine.Trace, particle: int, replay: Replay, cuts: list[GradientCut]
) -> poutine.Trace:
    """Return what a second run of the guide replays: all but Delta sites, which are recomputed."""
    copy = guide.copy()
    for site in latent_sites(guide):
        if is_delta(site):
            copy.remove_node(site["name"])
        elif replay == "values":
            copy.nodes[site["name"]] = {**site, "value": site["value"].detach()}
        else:
            copy.nodes[site["name"]] = _cut(site, particle, cuts)
    return copy


def _cut(site: Site, particle: int, cuts: list[GradientCut]) -> Site:
    if not site["value"].requires_grad:
        return site
    cuts.append(GradientCut(site, particle))
    return {**site, "value": cuts[-1].stand_in}


class _ShareWithinEstimate(Messenger):
    """Gives the K samples of an estimate one value at the named sites."""

    def __init__(self, names: frozenset[str], particles: Particles) -> None:
        super().__init__()
        self.names, self.particles, self.particle = names, particles, 0
        self.first: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        # This handler is the outermost: it speaks before the trace records.
        if msg["name"] in self.names and not msg["is_observed"]:
            msg["value"] = self._shared(msg["name"], msg["value"], msg["fn"].event_dim)

    def _shared(self, name: str, value: Tensor, event_dim: int) -> Tensor:
        M, K = self.particles.num_estimates, self.particles.num_particles
        if self.particles.dim is None:
            if self.particle % K == 0:
                self.first[name] = value
            return self.first[name]
        dim = value.dim() + self.particles.dim - event_dim
        split = value.unflatten(dim, (M, K))
        return split.narrow(dim + 1, 0, 1).expand_as(split).flatten(dim, dim + 1)
