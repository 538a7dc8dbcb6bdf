"""What S runs drew at one site, as ``[S, *plates, *event]``, and back to where Pyro has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_recursive.tracing.plates import Particles
from pyro_recursive.tracing.sites import Site, plates_of

__all__ = ["Kind", "SiteDraws", "computed", "drawn", "joined"]

Kind = Literal["latent", "computed", "observed"]


@dataclass(frozen=True)
class SiteDraws:
    """The values of one site: ``value`` is ``[S, *plates, *event]``.

    ``frames`` are the plates that have dims, from left to right in Pyro's order, ``cell`` the
    iterations of the sequential ones around the site.
    """

    value: Tensor
    frames: tuple[Any, ...] = ()
    kind: Kind = "latent"
    cell: Mapping[str, int] = field(default_factory=dict)

    @property
    def plates(self) -> tuple[str, ...]:
        """The names of the plates that have dims."""
        return tuple(frame.name for frame in self.frames)

    @property
    def event_shape(self) -> torch.Size:
        """The shape of one entry."""
        return self.value.shape[1 + len(self.frames) :]

    def placed(self, nesting: int) -> Tensor:
        """Return the values as a run under a plate of samples has them, left of `nesting` dims."""
        sizes = {frame.dim: frame.size for frame in self.frames}
        batch = [sizes.get(dim, 1) for dim in range(-nesting, 0)]
        return self.value.reshape(len(self.value), *batch, *self.event_shape)

    def row(self, number: int) -> Tensor:
        """Return the value of one draw, as a run without a plate of samples has it."""
        one = replace(self, value=self.value[number : number + 1])
        return one.placed(max((-frame.dim for frame in self.frames), default=0))[0]

    def take(self, index: Tensor, plates: Sequence[str]) -> "SiteDraws":
        """Return the draws of other numbers, each entry of some plates its own.

        :param index: numbers ``[S', *plates]``
        """
        for name in plates:
            if name not in self.plates:  # they come first, as in `PlateLayout`
                index = index.select(1, self.cell[name])
        sizes = [frame.size if frame.name in plates else 1 for frame in self.frames]
        index = index.reshape(len(index), *sizes, *[1] * len(self.event_shape))
        value = self.value.gather(0, index.expand(len(index), *self.value.shape[1:]))
        return replace(self, value=value)


def joined(parts: Sequence[SiteDraws]) -> SiteDraws:
    """Put draws of one site together, those of several chunks."""
    return replace(parts[0], value=torch.cat([part.value for part in parts]))


def drawn(
    sites: Sequence[Site],
    values: Sequence[Tensor],
    event_dim: int,
    particles: Particles,
    nesting: int,
    kind: Kind = "latent",
) -> SiteDraws:
    """Gather the values of a site from one run for all samples, or from a run for each."""
    frames = _frames(sites[0])
    total = 1 if particles.dim is None else particles.total
    sizes = {frame.dim: frame.size for frame in frames}
    batch = (total, *(sizes.get(dim, 1) for dim in range(-nesting, 0)))
    rows = []
    for value in values:
        padding = (1,) * (len(batch) + event_dim - value.dim())
        value = value.detach().reshape(padding + value.shape)
        event = value.shape[len(batch) :]
        value = value.expand(*batch, *event)
        rows.append(value.reshape(total, *(frame.size for frame in frames), *event))
    return SiteDraws(torch.cat(rows), frames, kind, _cell(sites[0]))


def computed(sites: Sequence[Site], outline: Site, particles: Particles, nesting: int) -> SiteDraws:
    """Gather what a deterministic site recorded, whose event dims Pyro does not know.

    :param outline: the site in a single run, whose shape tells where the samples stand
    :raises ValueError: the shape of all samples does not follow from that of one
    """
    shape = outline["value"].shape
    depth = _depth(outline)
    frames = tuple(frame for frame in _frames(sites[0]) if -frame.dim <= depth)
    total = 1 if particles.dim is None else particles.total
    values = []
    for site in sites:
        value = site["value"]
        if value.shape == shape:  # it depends on no sample, or there is only one
            value = value.expand(total, *shape)
        elif value.shape[:1] != (total,) or value[0].numel() != shape.numel():
            raise _unclear(site, shape)
        values.append(value.reshape(total, *(1,) * (nesting - depth), *shape))
    inside = {**sites[0], "cond_indep_stack": frames}
    found = drawn([inside], values, len(shape) - depth, particles, nesting, "computed")
    return replace(found, cell=_cell(sites[0]))


def _depth(outline: Site) -> int:
    """Return how many dims of a deterministic site, from the left, are those of plates."""
    shape, event_dim = outline["value"].shape, outline["fn"].event_dim
    if event_dim < len(shape):
        return len(shape) - event_dim
    frames = _frames(outline)
    depth = max((-frame.dim for frame in frames), default=0)
    if depth > len(shape):
        return 0
    sizes = {depth + frame.dim: frame.size for frame in frames}
    fits = all(shape[place] in (1, sizes.get(place, 1)) for place in range(depth))
    return depth if fits else 0


def _frames(site: Site) -> tuple[Any, ...]:
    found = [frame for frame in plates_of(site).values() if frame.vectorized]
    return tuple(sorted(found, key=lambda frame: frame.dim))


def _cell(site: Site) -> dict[str, int]:
    loops = [frame for frame in plates_of(site).values() if not frame.vectorized]
    return {frame.name: (frame.counter - 1) % frame.size for frame in loops}


def _unclear(site: Site, shape: torch.Size) -> ValueError:
    return ValueError(
        f"Deterministic site '{site['name']}' has shape {tuple(shape)} in one run of the model and "
        f"{tuple(site['value'].shape)} in a run for all samples at once, which is no plate of "
        "samples on the left. Count dims from the right in its computation, or use "
        "vectorize_particles=False."
    )
