"""Where the plates of a program go in ``[M, K, *plates]``, and the rules that they must keep.

``plates`` are the plates that enclose every sample site of model and guide; each of their entries
(a datum, usually) has its own K weights. Every other plate is summed.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.tracing.runs import ParticleRun, Particles
from pyro_recursive.tracing.sites import (
    Site,
    independent_plates_of,
    nesting_of,
    plates_of,
    sites,
    subsample_scale,
)
from pyro_recursive.tracing.structure import Structure

__all__ = [
    "Layout",
    "check_subsampling",
    "half_subsampled",
    "layout_of",
    "local_sites",
    "warn_if_joint",
    "warn_if_nothing_local",
]


@dataclass(frozen=True)
class Layout:
    """How Pyro's dims become ``[M, K, *plates]``.

    ``plates`` are frames of the shared plates: sequential ones first, then the vectorised from left
    to right. ``scale`` is the product of their ``full_size / size``.
    """

    particles: Particles
    max_plate_nesting: int
    plates: tuple[Any, ...]

    @cached_property
    def scale(self) -> float:
        """The subsample scale of the shared plates."""
        return math.prod(subsample_scale(frame) for frame in self.plates)

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the shared plates."""
        return tuple(frame.size for frame in self.plates)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """The dims of the shared vectorised plates, in Pyro's count from the right."""
        return tuple(frame.dim for frame in self.plates if frame.vectorized)

    @cached_property
    def sequential(self) -> tuple[str, ...]:
        """The names of the shared sequential plates."""
        return tuple(frame.name for frame in self.plates if not frame.vectorized)

    def cell(self, site: Site) -> tuple[int, ...]:
        """Return where the site stands in the shared sequential plates.

        A plate that is iterated once more goes on counting.
        """
        frames = {frame.name: frame for frame in site["cond_indep_stack"]}
        return tuple((frames[name].counter - 1) % frames[name].size for name in self.sequential)

    def gather(self, runs: Sequence[Sequence[tuple[Site, Tensor]]]) -> Tensor | None:
        """Sum the sites' log-densities of every run and return ``[M, K, *plates]``."""
        found = [self._gather_run(run) if run else None for run in runs]
        some = next((row for row in found if row is not None), None)
        if some is None:
            return None
        rows = [torch.zeros_like(some) if row is None else row for row in found]
        stacked = rows[0] if len(rows) == 1 else torch.cat(rows)
        return stacked.unflatten(0, (self.particles.num_estimates, self.particles.num_particles))

    def _gather_run(self, run: Sequence[tuple[Site, Tensor]]) -> Tensor:
        cells: dict[tuple[int, ...], Tensor] = {}
        for site, log_prob in run:
            cell = self.cell(site)
            reduced = self._reduce(site, log_prob)
            cells[cell] = cells[cell] + reduced if cell in cells else reduced
        total = 1 if self.particles.dim is None else self.particles.total
        target = (total, *self.shape[len(self.sequential) :])
        # A group may have sites in some of the cells only.
        zero = next(iter(cells.values())).new_zeros(())
        every = itertools.product(*map(range, self.shape[: len(self.sequential)]))
        rows = [cells.get(cell, zero) for cell in every]
        rows = [row if row.shape == target else row.expand(target) for row in rows]
        if not self.sequential:
            return rows[0]
        return torch.stack(rows, 1).reshape(total, *self.shape)

    def _reduce(self, site: Site, log_prob: Tensor) -> Tensor:
        """Sum over all plates that are not shared: to ``[particles, *vectorised plates]``."""
        width = self.max_plate_nesting + 1
        if log_prob.dim() != width:
            log_prob = log_prob.reshape((1,) * (width - log_prob.dim()) + log_prob.shape)
        others = [dim for dim in range(-width + 1, 0) if dim not in self.dims]
        return log_prob.sum(others) if others else log_prob

    def at_site(self, tensor: Tensor, site: Site, particle: int = 0) -> Tensor:
        """Broadcast an ``[M, K, *plates]`` tensor against the value of one site.

        Where runs are looped, the row of one particle.
        """
        rows = tensor.flatten(0, 1)
        rows = rows[particle : particle + 1] if self.particles.dim is None else rows
        for index in self.cell(site):
            rows = rows.select(1, index)
        event_dim = site["fn"].event_dim
        shape = [1] * (self.max_plate_nesting + 1 + event_dim)
        shape[0] = rows.shape[0]
        for dim, size in zip(self.dims, rows.shape[1:], strict=True):
            shape[dim - event_dim] = size
        return rows.reshape(shape[max(len(shape) - site["value"].dim(), 0) :])


def layout_of(
    particles: Particles, runs: Sequence[ParticleRun], only: frozenset[str] | None = None
) -> Layout:
    """Find the shared plates of runs and check the rules for all others."""
    traces = [trace for run in runs for trace in (run.model, run.guide)]
    nesting = nesting_of(*traces) if particles.dim is None else -particles.dim - 1
    stacks = [
        independent_plates_of(site)
        for site in sites(*traces)
        if only is None or site["name"] in only
    ]
    if not stacks:
        return Layout(particles, nesting, ())
    shared = set.intersection(*map(set, stacks))
    frames = [frame for name, frame in stacks[0].items() if name in shared]
    frames.sort(key=lambda frame: frame.dim if frame.vectorized else -math.inf)
    return Layout(particles, nesting, tuple(frames))


def check_subsampling(runs: Sequence[ParticleRun], layout: Layout) -> None:
    """Raise where a subsampled plate does not enclose every site; the bound must be linear then."""
    found = half_subsampled(runs, layout)
    if found is not None:
        frame, outside = found
        raise ValueError(
            f"Plate '{frame.name}' is subsampled ({frame.size} of {frame.full_size}) but does "
            f"not enclose site '{outside}'. The logarithm of a mean over '{outside}' has "
            "no unbiased estimate from a minibatch. Use global_latents='elbo' (ELBO for "
            "the global latents, this bound for the local ones), full data, or Trace_ELBO."
        )


def half_subsampled(runs: Sequence[ParticleRun], layout: Layout) -> tuple[Any, str] | None:
    """Return the frame of a subsampled plate that does not enclose every site, and such a site."""
    shared = {frame.name for frame in layout.plates}
    everything = list(sites(runs[0].model, runs[0].guide))
    for site in everything:
        for name, frame in plates_of(site).items():
            if name not in shared and subsample_scale(frame) != 1:
                return frame, next(s["name"] for s in everything if name not in plates_of(s))
    return None


def local_sites(structure: Structure) -> frozenset[str]:
    """Return the names of the sites inside a plate that encloses every observed site."""
    data_plates = _data_plates(structure)
    everything = [*structure.model.values(), *structure.guide.values()]
    return frozenset(site["name"] for site in everything if data_plates & set(plates_of(site)))


def _data_plates(structure: Structure) -> set[str]:
    """Return the names of the plates that enclose every observed site."""
    observed = [set(plates_of(site)) for site in structure.model.values() if site["is_observed"]]
    data_plates = set.intersection(*observed) if observed else set()
    if not data_plates:
        raise ValueError(
            "global_latents='elbo' needs a plate that encloses every observed site; "
            f"the observed sites stand in {observed or 'no plate'}"
        )
    return data_plates


def warn_if_nothing_local(structure: Structure, num_estimates: int, num_particles: int) -> None:
    """Warn where global_latents='elbo' leaves no latent that the K samples could differ in."""
    local = local_sites(structure)
    everything = [*structure.model.values(), *structure.guide.values()]
    if any(site["name"] in local and not site["is_observed"] for site in everything):
        return
    plates = ", ".join(f"'{name}'" for name in sorted(_data_plates(structure)))
    warnings.warn(
        f"No latent site is inside plate {plates}, so that under global_latents='elbo' the "
        f"{num_particles} samples inside a logarithm are one: this is the ELBO with "
        f"{num_estimates} sample{'s' * (num_estimates > 1)}. Trace_ELBO is the same for less; "
        "global_latents='joint', with all data in each step, is tighter.",
        stacklevel=4,
    )


def warn_if_joint(runs: Sequence[ParticleRun], layout: Layout) -> None:
    """Warn where one weight covers the whole data set although there are local latents."""
    if layout.plates:
        return
    latent = [site for site in sites(runs[0].model) if not site["is_observed"]]
    for site in sites(runs[0].model):
        for name, frame in plates_of(site).items():
            local = next((s["name"] for s in latent if name in plates_of(s)), None)
            if site["is_observed"] and local and frame.size > 1:
                outside = next((s["name"] for s in latent if name not in plates_of(s)), None)
                if outside is None:
                    cause = ", and the guide has one joint density over its entries"
                    remedy = "A guide with plate= or an encoder gives each entry its own."
                else:
                    cause = f" but not '{outside}'"
                    remedy = "global_latents='elbo' gives each entry its own."
                warnings.warn(
                    f"Plate '{name}' encloses latent site '{local}'{cause}, so that all its "
                    f"{frame.size} entries share one joint weight: a valid bound, but the more "
                    f"entries the looser. {remedy}",
                    stacklevel=4,
                )
                return
