"""Latents that a guide enumerates: all samples run for each combination of their values.

A latent of the guide that is marked ``infer={"enumerate": ...}`` is not sampled. Each of its C
values has M * K samples of all else, in a block of particles of its own, so that guide and model
run as on sampled values. `pyro.infer.TraceEnum_ELBO` draws the same numbers for K = 1.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_recursive.tracing.plates import Particles, PlateLayout, ProgramStructure
from pyro_recursive.tracing.sites import (
    Site,
    SiteRecord,
    SiteTable,
    entry_of,
    is_delta,
    is_marked_in_guide,
)
from pyro_recursive.tracing.user_warnings import warn_user

MANY = 1000  # combinations of values
Cell = dict[str, int]  # the iteration of each sequential plate around a site


def axes_of(records: Iterable[SiteRecord]) -> tuple[int, ...] | None:
    """Return the numbers of values as `Particles.values`: of the first latent, the second, ...

    Entries of a sequential plate share them, as those of a vectorised one do; None where they are
    not alike, so that the latents can only be sampled.
    """
    by_cell: dict[frozenset[tuple[str, int]], list[int]] = {}
    for record in records:
        cell = frozenset(_cell_of(record.site).items())
        by_cell.setdefault(cell, []).append(number_of_values(record.site))
    found = {tuple(each) for each in by_cell.values()}
    if len(found) > 1:
        return None
    return found.pop() if found else ()


def value_axes(structure: ProgramStructure, memory: dict) -> tuple[int, ...]:
    """Return the numbers of values as `Particles.values`; raise where entries are not alike.

    Many combinations warn, once for each program with its ``memory``.
    """
    if structure.value_axes is None:
        raise NotImplementedError(
            f"Guide sites {sorted(structure.guide_values)} are enumerated, and not alike in all "
            "entries of a sequential plate. Enumerate them in the model."
        )
    number, key = math.prod(structure.value_axes), "the guide has many values"
    if number > MANY and key not in memory:
        memory[key] = True
        names = ", ".join(f"'{name}'" for name in sorted(structure.guide_values))
        warn_user(
            f"Guide sites {names} have {number} combinations of values, and each runs all samples. "
            "Enumerate some of them in the model."
        )
    return structure.value_axes


def number_of_values(site: Site) -> int:
    """Return the size of a site's support."""
    return len(site["fn"].enumerate_support(expand=False))


def outside_of_plates(table: SiteTable, layout: PlateLayout) -> SiteRecord | None:
    """Return an enumerated site of the guide in more plates than the log-weights, if any.

    Its entries there would have values of their own, and C**(size) combinations in one weight.
    """
    for record in table.enumerated_in_guide:
        plates = {name for name, frame in record.plates.items() if frame.size > 1}
        if not plates <= layout.names:
            return record
    return None


class GuideValues(Messenger):
    """Gives the enumerated sites of a guide their values, a combination to each block of particles.

    What the guide samples before such a site is the same for all values of it: their differences
    have no noise from elsewhere. The outermost handler, outside of the plate of particles.
    """

    def __init__(self, particles: Particles) -> None:
        super().__init__()
        self.particles, self.particle = particles, 0
        self.seen: list[tuple[int, Cell]] = []  # the axes of this run's enumerated sites
        self.first: dict[tuple[str, int], Tensor] = {}  # where runs are looped
        self.packed: frozenset[str] = frozenset()

    def __enter__(self) -> "GuideValues":
        self.seen = []
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if not is_marked_in_guide(msg):
            return
        cell, fn, sizes = _cell_of(msg), msg["fn"], self.particles.values
        axis = sum(cell == other for _, other in self.seen)
        self.seen.append((axis, cell))
        support = fn.enumerate_support(expand=False)
        if sizes[axis : axis + 1] != (len(support),):
            raise ValueError(
                f"Guide site '{msg['name']}' has a support of another size, {len(support)}, than "
                f"in the first run. Make its shape depend on the arguments alone."
            )
        support = support.reshape(len(support), *fn.event_shape)
        inner = self._block(axis)
        if self.particles.dim is None:
            value = support[self.particle // inner % len(support)]
        else:
            rows = support[:, None].expand(-1, inner, *fn.event_shape).flatten(0, 1)
            rows = rows.expand(self.particles.total // len(rows), *rows.shape).flatten(0, 1)
            ones = (1,) * (-self.particles.dim - 1)
            value = rows.reshape(len(rows), *ones, *fn.event_shape)
        batch = value.shape[: value.dim() - len(fn.event_shape)]
        batch = torch.broadcast_shapes(batch, fn.batch_shape)
        msg["value"] = value.expand(batch + fn.event_shape)

    def _pyro_post_sample(self, msg: Any) -> None:
        is_drawn = not msg["is_observed"] and not site_is_subsample(msg) and not is_delta(msg)
        if is_drawn and not is_marked_in_guide(msg) and msg["name"] not in self.packed:
            msg["value"] = self._shared(msg["name"], msg["value"], msg["fn"].event_dim, msg)

    def _pyro_post_joint_draw(self, msg: Any) -> None:
        self.packed |= msg["args"][1]
        msg["value"] = self._shared(min(msg["args"][1]), msg["value"], 1, msg)

    def _shared(self, name: str, value: Tensor, event_dim: int, msg: Any) -> Tensor:
        """Return a value that is the same for all values of the enumerated sites that follow."""
        cell = _cell_of(msg)
        before = [
            axis
            for axis, other in self.seen
            if all(cell.get(plate, entry) == entry for plate, entry in other.items())
        ]
        block = self._block(1 + max(before, default=-1))
        if block == self.particles.total:
            return value
        if self.particles.dim is None:
            return self.first.setdefault((name, self.particle % block), value)
        dim = value.dim() + self.particles.dim - event_dim
        if dim < 0:  # the same in all particles
            return value
        split = value.unflatten(dim, (-1, block))
        return split.narrow(dim, 0, 1).expand_as(split).flatten(dim, dim + 1)

    def _block(self, axis: int) -> int:
        """Return how many particles in a row have one value of the sites from this axis on."""
        particles = self.particles
        samples = particles.num_estimates * particles.num_particles
        return samples * math.prod(particles.values[:axis])


def _cell_of(site: Site) -> Cell:
    frames = [frame for frame in site["cond_indep_stack"] if not frame.vectorized]
    return {frame.name: entry_of(frame) for frame in frames}
