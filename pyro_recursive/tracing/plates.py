"""The plates of a program, and where they go in ``[M, K, *plates]``.

``plates`` are those that enclose every sample site of model and guide; each of their entries (a
datum, usually) has its own K weights. Every other plate is summed.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.poutine import runtime
from pyro.poutine.runtime import get_plates
from torch import Tensor

from pyro_recursive.tracing.sites import (
    PARTICLE_PLATE,
    PlateDependence,
    Site,
    SiteTable,
    entry_of,
    plates_of,
    subsample_scale,
)


@dataclass(frozen=True)
class Particles:
    """M * K samples, m varying slowest; ``dim`` is that of their plate, None in looped runs.

    With ``vmap`` the model runs under `torch.vmap`, with ``vmap_guide`` the guide, too; the plate
    is in their traces alone. ``values`` are the numbers of values of latents that are enumerated in
    the guide: all samples run for each of the C combinations, which vary slower than m, the first
    latent's value fastest.
    """

    num_estimates: int
    num_particles: int
    dim: int | None = None
    vmap: bool = False
    vmap_guide: bool = False
    values: tuple[int, ...] = ()

    @cached_property
    def total(self) -> int:
        return math.prod(self.values) * self.num_estimates * self.num_particles

    @property
    def alike(self) -> "Particles":
        """The same samples as C * M estimates, whatever their values."""
        return replace(self, num_estimates=self.total // self.num_particles, values=())

    def plate(self) -> AbstractContextManager:
        """Return the plate of the particles, nothing where runs are looped."""
        if self.dim is None:
            return nullcontext()
        return pyro.plate(PARTICLE_PLATE, self.total, dim=self.dim)


Mode = Literal["plate", "vmap", "vmap guide", "loop"]


@dataclass
class ProgramStructure:
    """The plate nesting of a program and the plates of each sample site, from one run.

    ``ranks`` are the numbers of dims of the guide's values, and ``sizes`` all sizes of dims in that
    run, on ``devices``. ``enumerated`` are the model's latents that are summed out, which that run
    draws, and ``num_values`` the largest number of their values in one density. ``guide_values``
    are the latents that the guide enumerates, with their numbers of values (which that run draws,
    too), and ``value_axes`` those numbers as in `Particles.values`, None where they are not alike.
    ``misfit`` says why its sites do not fit together; handlers around a call may change that.
    ``mode`` is how many samples run: under a plate, the model or also the guide under `torch.vmap`,
    or in a loop. It is None until it is chosen, and ``cause`` says why it is not the plate
    (`tracing.choice`).
    ``dependence`` has the plates whose entries were tested for independence, None before that test
    (`tracing.dependence`).
    """

    max_plate_nesting: int
    model: dict[str, Site]
    guide: dict[str, Site]
    ranks: dict[str, int] = field(default_factory=dict)
    sizes: frozenset[int] = frozenset()
    enumerated: frozenset[str] = frozenset()
    num_values: int = 1
    guide_values: dict[str, int] = field(default_factory=dict)
    value_axes: tuple[int, ...] | None = ()
    devices: frozenset[str] = frozenset()
    misfit: Exception | None = None
    mode: Mode | None = None
    cause: str = ""
    dependence: dict[str, PlateDependence] | None = None


def structure_in(table: SiteTable) -> ProgramStructure:
    """Return the structure that the sites of one run show, without their tensors."""
    keys = ("name", "is_observed", "cond_indep_stack")
    model, guide = (
        {record.name: {key: record.site[key] for key in keys} for record in records}
        for records in (table.model, table.guide)
    )
    enumerated = frozenset(record.name for record in table.enumerated)
    return ProgramStructure(table.nesting, model, guide, enumerated=enumerated)


@dataclass(frozen=True)
class PlateLayout:
    """How Pyro's dims become ``[M, K, *plates]``.

    ``plates`` are frames of the shared plates: ``sequential`` ones first, then the vectorised from
    left to right, at ``dims`` (negative). ``scale`` is the product of ``full_size / size``. Where
    the guide enumerates latents, the combination of their values is one more dim on the right, of
    size C: ``[M, K, *plates, C]``.
    """

    particles: Particles
    max_plate_nesting: int
    plates: tuple[Any, ...]

    @cached_property
    def scale(self) -> float:
        subsampled = [f for f in self.plates if f.full_size not in (None, f.size)]
        return math.prod(map(subsample_scale, subsampled), start=1.0)

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(frame.name for frame in self.plates)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(frame.size for frame in self.plates)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """``[M, K, *plates]`` or ``[M, K, *plates, C]``."""
        particles = self.particles
        values = (math.prod(particles.values),) if particles.values else ()
        return (particles.num_estimates, particles.num_particles, *self.shape, *values)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        return tuple(frame.dim for frame in self.plates if frame.vectorized)

    @cached_property
    def sequential(self) -> tuple[str, ...]:
        return tuple(frame.name for frame in self.plates if not frame.vectorized)

    def within(self, frames: Iterable[Any]) -> "PlateLayout":
        """Return the layout of these plates, which are at least its own."""
        others = [frame for frame in frames if frame.name not in self.names]
        return PlateLayout(self.particles, self.max_plate_nesting, _in_order(self.plates, others))

    def cell(self, site: Site) -> tuple[int, ...]:
        """Return the site's iteration of each shared sequential plate."""
        frames = {frame.name: frame for frame in site["cond_indep_stack"]}
        return tuple(entry_of(frames[name]) for name in self.sequential)

    def gather(self, runs: Sequence[Sequence[tuple[Site, Tensor]]]) -> Tensor | None:
        """Sum the sites' log-densities of every run and return them in `whole_shape`."""
        found = [self._gather_run(run) if run else None for run in runs]
        some = next((row for row in found if row is not None), None)
        if some is None:
            return None
        rows = [torch.zeros_like(some) if row is None else row for row in found]
        stacked = rows[0] if len(rows) == 1 else torch.cat(rows)
        split = stacked.unflatten(0, (-1, *self.whole_shape[:2]))
        return split.movedim(0, -1) if self.particles.values else split[0]

    def _gather_run(self, run: Sequence[tuple[Site, Tensor]]) -> Tensor:
        """Sum over all plates that are not shared: to ``[particles, *plates]``."""
        width = self.max_plate_nesting + 1
        others = [dim for dim in range(-width + 1, 0) if dim not in self.dims]
        cells: dict[tuple[int, ...], Tensor] = {}
        for site, log_prob in run:
            if log_prob.dim() != width:  # dims on the left are those of latents with one value
                shape = (1,) * (width - log_prob.dim()) + log_prob.shape[-width:]
                log_prob = log_prob.reshape(shape)
            reduced = log_prob.sum(others) if others else log_prob
            cell = self.cell(site) if self.sequential else ()
            cells[cell] = cells[cell] + reduced if cell in cells else reduced
        total = 1 if self.particles.dim is None else self.particles.total
        target = (total, *self.shape[len(self.sequential) :])
        # Iterations without a site of this group contribute 0.
        zero = next(iter(cells.values())).new_zeros(())
        every = itertools.product(*map(range, self.shape[: len(self.sequential)]))
        rows = [cells.get(cell, zero) for cell in every]
        rows = [row if row.shape == target else row.expand(target) for row in rows]
        if not self.sequential:
            return rows[0]
        return torch.stack(rows, 1).reshape(total, *self.shape)

    def at_site(self, tensor: Tensor, site: Site, particle: int = 0) -> Tensor:
        """Broadcast what has `whole_shape`, or a looped particle's row, against a site's value."""
        if self.particles.values:
            tensor = tensor.movedim(-1, 0).flatten(0, 1)
        rows = tensor.flatten(0, 1)
        rows = rows[particle : particle + 1] if self.particles.dim is None else rows
        if self.sequential:
            for index in self.cell(site):
                rows = rows.select(1, index)
        event_dim = site["fn"].event_dim
        shape = [1] * (self.max_plate_nesting + 1 + event_dim)
        shape[0] = rows.shape[0]
        for dim, size in zip(self.dims, rows.shape[1:], strict=True):
            shape[dim - event_dim] = size
        return rows.reshape(shape[max(len(shape) - site["value"].dim(), 0) :])


def layout_of(
    particles: Particles, tables: Sequence[SiteTable], only: frozenset[str] | None = None
) -> PlateLayout:
    """Return the layout of runs: the plates that enclose every site, or all in `only`."""
    nesting = -particles.dim - 1 if particles.dim else max(table.nesting for table in tables)
    stacks = [
        record.row_plates
        for table in tables
        for record in table.records
        if only is None or record.name in only
    ]
    if not stacks:
        return PlateLayout(particles, nesting, ())
    shared = set.intersection(*map(set, stacks))
    frames = [frame for name, frame in stacks[0].items() if name in shared]
    return PlateLayout(particles, nesting, _in_order(frames))


def _in_order(*frames: Iterable[Any]) -> tuple[Any, ...]:
    every = itertools.chain(*frames)
    return tuple(sorted(every, key=lambda each: each.dim if each.vectorized else -math.inf))


def outer_shape() -> tuple[int, ...]:
    """Return the batch shape of the plates around a program or site: those of particles, say."""
    frames = [frame for frame in get_plates() if frame.vectorized and frame.size != -1]
    shape = [1] * max((-frame.dim for frame in frames), default=0)
    for frame in frames:
        shape[frame.dim] = frame.size
    return tuple(shape)


@contextmanager
def outside_of_plates() -> Iterator[None]:
    """Run a block as if no handler or plate were around it: its plates may have their names."""
    dims = runtime._DIM_ALLOCATOR  # Pyro has no public way to leave a plate
    around, dims._stack = dims._stack, []
    try:
        with poutine.block():
            yield
    finally:
        dims._stack = around


def local_sites(structure: ProgramStructure) -> frozenset[str]:
    """Return the names of the sites inside a plate that encloses every observed site."""
    enclosing = data_plates(structure.model.values())
    if not enclosing:
        raise ValueError("global_latents='elbo' needs a plate that encloses every observed site.")
    everything = [*structure.model.values(), *structure.guide.values()]
    return frozenset(site["name"] for site in everything if enclosing & set(plates_of(site)))


def data_plates(model: Iterable[Site]) -> set[str]:
    """Return the plates that enclose every observed site of a model."""
    observed = [set(plates_of(site)) for site in model if site["is_observed"]]
    return set.intersection(*observed) if observed else set()
