"""Log-densities of traces as ``[M, K, *plates]`` tensors, and the rules for plates.

``plates`` are the plates that enclose every sample site of model and guide; each of their entries
(a datum, usually) has its own K weights. Every other plate is summed. The subsample scale of the
shared plates is taken out of the log-weights, to be multiplied on after the bound: inside a
logarithm of a mean it would be a power of the weights. A user's own scales and masks stay.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_recursive.traces import (
    PARTICLE_PLATE,
    Draw,
    Particles,
    Structure,
    check_batch_shape,
    is_delta,
    nesting_of,
    sites,
)

__all__ = ["Densities", "Layout", "densities", "layout_of"]

Site = dict[str, Any]


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
        return math.prod(_subsample_scale(frame) for frame in self.plates)

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

    def gather(self, runs: Sequence[Iterable[tuple[Site, Tensor]]]) -> Tensor | None:
        """Sum the sites' log-densities of every run and return ``[M, K, *plates]``."""
        rows = [self._gather_run(run) for run in runs]
        if all(row is None for row in rows):
            return None
        shape = (-1, *self.shape)
        stacked = torch.cat([row.reshape(shape) for row in rows if row is not None])
        return stacked.unflatten(0, (self.particles.num_estimates, self.particles.num_particles))

    def _gather_run(self, run: Iterable[tuple[Site, Tensor]]) -> Tensor | None:
        cells: dict[tuple[int, ...], Tensor] = {}
        for site, log_prob in run:
            cell = self.cell(site)
            reduced = self._reduce(site, log_prob)
            cells[cell] = cells[cell] + reduced if cell in cells else reduced
        if not cells:
            return None
        total = 1 if self.particles.dim is None else self.particles.total
        target = (total, *self.shape[len(self.sequential) :])
        # A group may have sites in some of the cells only.
        zero = next(iter(cells.values())).new_zeros(())
        every = itertools.product(*map(range, self.shape[: len(self.sequential)]))
        rows = [cells.get(cell, zero).expand(target) for cell in every]
        return rows[0] if len(rows) == 1 else torch.stack(rows, 1)

    def _reduce(self, site: Site, log_prob: Tensor) -> Tensor:
        """Sum over all plates that are not shared: to ``[particles, *vectorised plates]``."""
        width = self.max_plate_nesting + 1
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


@dataclass(frozen=True)
class Densities:
    """Log-densities as ``[M, K, *plates]`` in nats; None for a group without sites.

    ``model`` is log p; ``density``, ``score`` and ``jacobian`` together are log q: of the
    reparameterised sites, of the other sampled ones, and of what is computed from them. Scales and
    masks are in these; ``density_rest`` and ``score_rest`` are what they took away from the density
    that the samples come from, None where they took nothing. ``names`` are the sites that were
    asked for, None for all.
    """

    layout: Layout
    model: Tensor | None
    density: Tensor | None
    score: Tensor | None
    jacobian: Tensor | None
    density_rest: Tensor | None = None
    score_rest: Tensor | None = None
    names: frozenset[str] | None = None

    @property
    def log_weights(self) -> Tensor:
        """Return ``log p - log q``, detached."""
        total = torch.zeros(()) if self.model is None else self.model.detach()
        for group in (self.density, self.score, self.jacobian):
            if group is not None:
                total = total - group.detach()
        particles = self.layout.particles
        shape = (particles.num_estimates, particles.num_particles, *self.layout.shape)
        return total.expand(shape)


def densities(
    runs: Sequence[Draw], layout: Layout, only: frozenset[str] | None = None
) -> Densities:
    """Return the log-densities of runs; `only` restricts them to sites of these names."""
    names = ("model", "density", "score", "jacobian", "density_rest", "score_rest")
    groups: dict[str, list[list[tuple[Site, Tensor]]]] = {
        name: [[] for _ in runs] for name in names
    }
    for number, run in enumerate(runs):
        for trace, group_of in ((run.model, lambda site: "model"), (run.guide, guide_group)):
            for site in sites(trace):
                if only is None or site["name"] in only:
                    group, log_prob = group_of(site), log_density(site, layout)
                    groups[group][number].append((site, log_prob))
                    if group in ("density", "score") and _is_weighted(site, layout):
                        rest = (site, _whole_density(site) - log_prob)
                        groups[f"{group}_rest"][number].append(rest)
    tensors = {name: layout.gather(group) for name, group in groups.items()}
    return Densities(layout, **tensors, names=only)


def guide_group(site: Site) -> str:
    """Return which part of log q a guide site belongs to; see `Densities`."""
    if is_delta(site) or (site["is_observed"] and site["fn"].has_rsample):
        return "jacobian"
    return "density" if site["fn"].has_rsample else "score"


def log_density(site: Site, layout: Layout) -> Tensor:
    """Return a site's log-density with mask and user's scale, without the shared plates' scale."""
    log_prob = scale_and_mask(_log_prob(site, site["fn"]), _own_scale(site, layout), site["mask"])
    check_batch_shape(site, log_prob.shape)
    return log_prob


def _log_prob(site: Site, fn: Any) -> Tensor:
    try:
        return fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    except ValueError as error:
        raise ValueError(f"At site '{site['name']}': {error}") from error


def _own_scale(site: Site, layout: Layout) -> Any:
    """Return a site's scale without that of the shared plates."""
    shared = {frame.name for frame in layout.plates}
    scale = site["scale"]
    for frame in site["cond_indep_stack"]:
        if frame.name in shared:
            scale = scale / _subsample_scale(frame)
    return scale


def _is_weighted(site: Site, layout: Layout) -> bool:
    """Whether a scale or a mask changes the site's density."""
    masked = site["mask"] is not None or _unmasked(site["fn"]) is not site["fn"]
    scale = _own_scale(site, layout)
    return masked or isinstance(scale, Tensor) or scale != 1


def _whole_density(site: Site) -> Tensor:
    """Return the log-density that a guide site is sampled from, whatever its scale and mask."""
    return _log_prob(site, _unmasked(site["fn"]))


def _unmasked(fn: Any) -> Any:
    if isinstance(fn, dist.MaskedDistribution):
        return _unmasked(fn.base_dist)
    if isinstance(fn, dist.Independent):
        base = _unmasked(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    return fn


def layout_of(
    particles: Particles, runs: Sequence[Draw], only: frozenset[str] | None = None
) -> Layout:
    """Find the shared plates of runs and check the rules for all others."""
    nesting = max(map(nesting_of, runs)) if particles.dim is None else -particles.dim - 1
    stacks = [
        _frames(site)
        for trace in (runs[0].model, runs[0].guide)
        for site in sites(trace)
        if only is None or site["name"] in only
    ]
    if not stacks:
        return Layout(particles, nesting, ())
    shared = set.intersection(*map(set, stacks))
    frames = [frame for name, frame in stacks[0].items() if name in shared]
    frames.sort(key=lambda frame: frame.dim if frame.vectorized else -math.inf)
    return Layout(particles, nesting, tuple(frames))


def check_subsampling(runs: Sequence[Draw], layout: Layout) -> None:
    """Raise where a subsampled plate does not enclose every site; the bound must be linear then."""
    shared = {frame.name for frame in layout.plates}
    everything = [site for trace in (runs[0].model, runs[0].guide) for site in sites(trace)]
    for site in everything:
        for name, frame in _frames(site).items():
            if name not in shared and _subsample_scale(frame) != 1:
                outside = next(s["name"] for s in everything if name not in _frames(s))
                raise ValueError(
                    f"Plate '{name}' is subsampled ({frame.size} of {frame.full_size}) but does "
                    f"not enclose site '{outside}'. The logarithm of a mean over '{outside}' has "
                    "no unbiased estimate from a minibatch. Use global_latents='elbo' (ELBO for "
                    "the global latents, this bound for the local ones), full data, or Trace_ELBO."
                )


def local_sites(structure: Structure) -> frozenset[str]:
    """Return the names of the sites inside a plate that encloses every observed site."""
    observed = [set(_frames(site)) for site in structure.model.values() if site["is_observed"]]
    data_plates = set.intersection(*observed) if observed else set()
    if not data_plates:
        raise ValueError(
            "global_latents='elbo' needs a plate that encloses every observed site; "
            f"the observed sites stand in {observed or 'no plate'}"
        )
    everything = [*structure.model.values(), *structure.guide.values()]
    return frozenset(site["name"] for site in everything if data_plates & set(_frames(site)))


def warn_if_joint(runs: Sequence[Draw], layout: Layout) -> None:
    """Warn where one weight covers the whole data set although there are local latents."""
    if layout.plates:
        return
    latent = [site for site in sites(runs[0].model) if not site["is_observed"]]
    for site in sites(runs[0].model):
        for name, frame in _frames(site).items():
            local = next((s["name"] for s in latent if name in _frames(s)), None)
            if site["is_observed"] and local and frame.size > 1:
                outside = next((s["name"] for s in latent if name not in _frames(s)), "?")
                warnings.warn(
                    f"Plate '{name}' encloses latent site '{local}' but not '{outside}', so that "
                    f"all its {frame.size} entries share one joint weight: a valid bound, but the "
                    "more entries the looser. global_latents='elbo' gives each entry its own.",
                    stacklevel=4,
                )
                return


def _frames(site: Site) -> dict[str, Any]:
    """Return the site's plates by name, the particle plate aside."""
    return {f.name: f for f in site["cond_indep_stack"] if f.name != PARTICLE_PLATE}


def _subsample_scale(frame: Any) -> float:
    return 1.0 if frame.full_size is None else frame.full_size / frame.size
