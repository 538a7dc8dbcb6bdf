"""Draws of the sites of a model."""

from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.tracing.sites import Site, entry_of, plates_of

Kind = Literal["latent", "computed", "observed"]


@dataclass(frozen=True)
class SiteDraws:
    """Draws of one site: ``value`` is a ``[S, *plates, *event]``-dim tensor.

    ``frames`` are Pyro's frames of the vectorised plates, from left to right; ``cell`` is the
    iteration of each sequential plate around the site.
    """

    value: Tensor
    frames: tuple[Any, ...] = ()
    kind: Kind = "latent"
    cell: Mapping[str, int] = field(default_factory=dict)

    @property
    def plates(self) -> tuple[str, ...]:
        return tuple(frame.name for frame in self.frames)

    @property
    def event_shape(self) -> torch.Size:
        return self.value.shape[1 + len(self.frames) :]

    def with_batch_dims(self, nesting: int | None = None) -> Tensor:
        """Return the values with Pyro's dims of plates, as many as the site needs by default."""
        sizes = {frame.dim: frame.size for frame in self.frames}
        nesting = -min(sizes, default=0) if nesting is None else nesting
        batch = [sizes.get(dim, 1) for dim in range(-nesting, 0)]
        return self.value.reshape(len(self.value), *batch, *self.event_shape)

    def take(self, index: Tensor, plates: Sequence[str]) -> "SiteDraws":
        """Return the draws of these indices, ``[S', *plates]``, each entry of plates its own."""
        for name in plates:
            if name not in self.plates:  # sequential plates, the first of a `PlateLayout`
                index = index.select(1, self.cell[name])
        sizes = [frame.size if frame.name in plates else 1 for frame in self.frames]
        index = index.reshape(len(index), *sizes, *[1] * len(self.event_shape))
        value = self.value.gather(0, index.expand(len(index), *self.value.shape[1:]))
        return replace(self, value=value)


def stacked(
    site: Site,
    values: Sequence[Tensor],
    total: int,
    nesting: int,
    kind: Kind = "latent",
    event_dim: int | None = None,
    frames: tuple[Any, ...] | None = None,
) -> SiteDraws:
    """Return the draws of a site from its values in one or several runs, `total` in each.

    Values have the plate of samples left of the ``nesting`` dims of other plates. ``event_dim`` and
    ``frames`` are by default those of the site.
    """
    frames = frames_of(site) if frames is None else frames
    event_dim = site["fn"].event_dim if event_dim is None else event_dim
    sizes = {frame.dim: frame.size for frame in frames}
    batch = (total, *(sizes.get(dim, 1) for dim in range(-nesting, 0)))
    rows = []
    for value in values:
        excess = value.dim() - len(batch) - event_dim  # dims of latents with one enumerated value
        value = value.detach().reshape((1,) * -excess + value.shape[max(0, excess) :])
        event = value.shape[len(batch) :]
        value = value.expand(*batch, *event)
        rows.append(value.reshape(total, *(frame.size for frame in frames), *event))
    loops = [frame for frame in plates_of(site).values() if not frame.vectorized]
    cell = {frame.name: entry_of(frame) for frame in loops}
    return SiteDraws(torch.cat(rows), frames, kind, cell)


def frames_of(site: Site) -> tuple[Any, ...]:
    """Return the frames of a site's vectorised plates, from left to right."""
    found = [frame for frame in plates_of(site).values() if frame.vectorized]
    return tuple(sorted(found, key=lambda frame: frame.dim))


@dataclass(frozen=True)
class Draws:
    """S draws of some sites of a model.

    ``draws["z"]`` is a ``[S, *plates, *event]``-dim tensor, for the vectorised plates around the
    site from left to right. ``log_p`` and ``log_q`` of posterior draws are log p(x, z) and log
    q(z), ``[S, *plates]`` in nats, float64, for the ``plates`` that enclose every sample site;
    where they are None, ``unweighted`` says why. ``resampled`` draws were chosen by their weights.
    ``summed`` names latents that log p is summed over: drawn from the model given all others.
    ``minibatch`` has the subsample sites of the plates around latents, which other calls must
    share; ``whole_minibatch`` those of all plates. Of log-likelihoods ``scaled`` names those with a
    scale, and ``factors`` those of a `pyro.factor` alone.
    """

    sites: dict[str, SiteDraws]
    count: int
    log_p: Tensor | None = None
    log_q: Tensor | None = None
    plates: tuple[str, ...] = ()
    resampled: bool = False
    minibatch: poutine.Trace = field(default_factory=poutine.Trace, repr=False)
    whole_minibatch: poutine.Trace = field(default_factory=poutine.Trace, repr=False)
    unweighted: str = ""
    scaled: tuple[str, ...] = ()
    summed: frozenset[str] = frozenset()
    factors: tuple[str, ...] = ()

    @property
    def log_densities(self) -> tuple[Tensor, Tensor]:
        """``log_p`` and ``log_q``; raises ValueError for draws that have none."""
        if self.log_p is None or self.log_q is None:
            raise ValueError(f"These draws have no log p, log q. {self.unweighted}")
        return self.log_p, self.log_q

    @property
    def log_weights(self) -> Tensor:
        """``[S, *plates]`` in nats."""
        log_p, log_q = self.log_densities
        return log_p - log_q

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sites:
            raise KeyError(f"No draws of '{name}', only of {sorted(self.sites)}.")
        return self.sites[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def keys(self) -> KeysView[str]:
        """Return the names of the sites, so that ``dict(draws)`` has their tensors."""
        return self.sites.keys()

    def __len__(self) -> int:
        return self.count

    def take(self, index: Tensor) -> "Draws":
        taken = {name: each.take(index, self.plates) for name, each in self.sites.items()}
        log_p, log_q = (log_density.gather(0, index) for log_density in self.log_densities)
        draws = replace(self, sites=taken, count=len(index), resampled=True)
        return replace(draws, log_p=log_p, log_q=log_q)

    def of_this_call(self) -> "Draws":
        """Return the draws with their whole minibatch, for another run on the same arguments."""
        return replace(self, minibatch=self.whole_minibatch)

    def of_kind(self, *kinds: Kind) -> dict[str, SiteDraws]:
        """Return sites of kinds ``"latent"``, ``"computed"`` (deterministic), ``"observed"``."""
        return {name: each for name, each in self.sites.items() if each.kind in kinds}


def joined(chunks: Sequence[dict[str, SiteDraws]]) -> dict[str, SiteDraws]:
    """Concatenate draws of the same sites."""
    return {
        name: replace(draws[0], value=torch.cat([each.value for each in draws]))
        for name in dict.fromkeys(name for chunk in chunks for name in chunk)
        for draws in [of_each(name, chunks)]
    }


def of_each(name: str, runs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return what each of several runs has of a name; raise where some have nothing."""
    if any(name not in run for run in runs):
        raise ValueError(f"Site '{name}' is in some runs only. Sample it in all, under a mask.")
    return [run[name] for run in runs]
