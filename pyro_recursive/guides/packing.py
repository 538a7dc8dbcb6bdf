"""The latent sites of a model as one unconstrained vector a row, and back.

Rows are the entries of the plates that all sites of a group share: the data, for local latents; a
group outside such plates is a single row. Plates that only some of the sites have are part of the
vector. With sites ``z`` in constrained and ``u`` in unconstrained space,

    log q(z) = log q(u) - log |dz / du|
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_recursive.guides.whitening import Whitening
from pyro_recursive.tracing.masks import without_events
from pyro_recursive.tracing.sites import Site, is_delta, plates_of, subsample_scale, tensors_of
from pyro_recursive.tracing.supports import (
    bare_support,
    coordinates,
    is_circular,
    is_fixed,
    plain_support,
)

Values = dict[str, Tensor]


@dataclass(frozen=True)
class PackedSite:
    """One latent site: its plates, the shape of its event, and its transform.

    ``inner_plates`` are the (dim, size) of its plates that are part of the vector, left to right.
    The support of a site that is not ``is_fixed`` may be another in each call: see `of`.
    """

    name: str
    frames: tuple[Any, ...]
    support: constraints.Constraint
    transform: Transform
    event_dim: int
    event_shape: torch.Size  # in unconstrained space
    inner_plates: tuple[tuple[int, int], ...]
    is_angle: bool
    is_fixed: bool

    def of(self, fn: Any) -> "PackedSite":
        """Return the site with the support of its distribution in one run of the model."""
        if self.is_fixed:
            return self
        transform = coordinates(fn, self.is_angle)
        return replace(self, support=plain_support(fn.support), transform=transform)

    @cached_property
    def is_real(self) -> bool:
        """Whether values are their own coordinates."""
        return bare_support(self.support) is constraints.real and not self.is_angle

    @cached_property
    def nesting(self) -> int:
        """How many dims the site's own plates take."""
        return max((-frame.dim for frame in self.frames), default=0)

    def flags(self, mask: Tensor, shape: torch.Size) -> Tensor:
        """Return a mask of values of a shape as one of unconstrained values."""
        batch = shape[: len(shape) - self.event_dim]
        of_events = without_events(mask, self.event_dim)
        if of_events is not None:
            ones = (1,) * len(self.event_shape)
            return of_events.reshape(of_events.shape + ones).expand(*batch, *self.event_shape)
        if not self.is_real:
            raise NotImplementedError(
                f"Latent site '{self.name}' is masked inside an event with bounds. Put the event's "
                "dim in a pyro.plate."
            )
        return mask.expand(shape)

    @cached_property
    def is_decreasing(self) -> bool:
        """Whether larger unconstrained values are smaller ones, as under an upper bound."""
        is_scalar = self.transform.bijective and self.transform.domain.event_dim == 0
        return is_scalar and bool(torch.as_tensor(self.transform.sign).lt(0).all())

    @cached_property
    def numel(self) -> int:
        """How many entries of the vector a row of this site takes."""
        return math.prod(size for _, size in self.inner_plates) * self.event_shape.numel()


@dataclass(frozen=True)
class LatentBlock:
    """A block of latent sites, packed as ``[*batch, D]``.

    ``rows`` are the frames of the plates that all sites share, left to right; ``nesting`` is how
    many dims plates take: ``batch`` has the rows at the dims of Pyro's plates, ones elsewhere.
    With a ``whitening`` the vector is v, ``u = loc + L v``; else it is u.
    """

    slots: tuple[PackedSite, ...]
    rows: tuple[Any, ...]
    nesting: int
    local: bool  # inside the plate of the data
    whitening: Whitening | None = None

    @cached_property
    def size(self) -> int:
        """D, the length of the vector."""
        return sum(slot.numel for slot in self.slots)

    def without(self, names: Collection[str]) -> tuple["LatentBlock", Tensor]:
        """Return the block without some sites, and flags of its entries of this vector, ``[D]``."""
        if self.whitening is not None:
            raise _is_mixed("observed or absent in this call", names)
        block = replace(self, slots=tuple(slot for slot in self.slots if slot.name not in names))
        flags = [torch.full((slot.numel,), slot.name not in names) for slot in self.slots]
        return block, torch.cat(flags)

    @cached_property
    def varying_supports(self) -> tuple[str, ...]:
        """The sites whose supports are read in each call: from data, say, or other latents."""
        return tuple(slot.name for slot in self.slots if not slot.is_fixed)

    def with_slots(self, slots: Iterable[PackedSite]) -> "LatentBlock":
        """Return the block with the sites as they are in one run of the model."""
        return replace(self, slots=tuple(slots)) if self.varying_supports else self

    def expand_rows(self, tensor: Tensor) -> Tensor:
        """Put the leading dims of ``[*rows, n]`` where Pyro has the plates: ``[*batch, n]``."""
        shape = [1] * self.nesting + [tensor.shape[-1]]
        for frame, size in zip(self.rows, tensor.shape, strict=False):
            shape[frame.dim - 1] = size
        return tensor.reshape(shape)

    def unflatten(self, u: Tensor) -> Values:
        """Return the sites' unconstrained values: ``[*batch, D]`` to the sites' own shapes."""
        if self.whitening is not None:
            u = self.whitening.unconstrained(u)
        return self._split(u)

    def step(self, steps: Values) -> Values:
        """Return a step along the vector, given by site, as one of the unconstrained values."""
        if self.whitening is None:
            return steps
        return self._split(self.whitening.stretched(self._joined(steps)))

    def _split(self, u: Tensor) -> Values:
        parts = zip(self.slots, u.split([slot.numel for slot in self.slots], -1), strict=True)
        return {slot.name: self._unflatten(slot, part) for slot, part in parts}

    def unpack(self, u: Tensor) -> Values:
        """Return the sites' values: ``[*batch, D]`` to ``[*site's batch, *event]``."""
        unflattened = self.unflatten(u)
        return {slot.name: slot.transform(unflattened[slot.name]) for slot in self.slots}

    def pack(self, values: Values, unconstrained: Values | None = None) -> Tensor:
        """Return the vector of the sites' values, ``[*batch, D]``; some may be given already."""
        known = dict(unconstrained or {})
        for slot in self.slots:
            if slot.name not in known:
                known[slot.name] = slot.transform.inv(values[slot.name])
        return self.flatten(known)

    def flatten(self, unconstrained: Values) -> Tensor:
        """Return the vector of the sites' unconstrained values; undoes `unflatten`."""
        u = self._joined(unconstrained)
        return u if self.whitening is None else self.whitening.whitened(u)

    def _joined(self, unconstrained: Values) -> Tensor:
        parts = [self._gather(slot, unconstrained[slot.name]) for slot in self.slots]
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*shape, -1) for part in parts], -1)

    def keep(self, kept: Values) -> Tensor | None:
        """Return the entries to keep of the vector, ``[*batch, D]``, from those of some sites."""
        if not any(slot.name in kept for slot in self.slots):
            return None
        if self.whitening is not None:
            raise _is_mixed("masked in parts", kept)
        some = next(iter(kept.values()))
        whole = some.new_ones(*[1] * self.nesting, self.size)
        parts = [
            self._gather(slot, kept[slot.name]) if slot.name in kept else whole[..., : slot.numel]
            for slot in self.slots
        ]
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*shape, -1) for part in parts], -1)

    def pack_trace(self, nodes: Mapping[str, Site]) -> Tensor:
        """Return the vector of the values in a trace of the model, ``[*batch, D]``."""
        block = self.with_slots(slot.of(nodes[slot.name]["fn"]) for slot in self.slots)
        return block.pack({slot.name: nodes[slot.name]["value"] for slot in self.slots})

    def log_volume(self, u: Tensor, kept: Values | None = None) -> Tensor:
        """Return ``log |dz / du|``, ``[*batch, D]`` to ``[*batch]``, of what is kept of the vector.

        ``kept`` has flags of sites' entries; sites without any are kept. With a whitening it is
        ``log |dz / dv|``.
        """
        total = u.new_zeros(u.shape[:-1])
        if self.whitening is not None:
            total = total + self.whitening.log_det
        constrained = [slot for slot in self.slots if not slot.is_real]
        unconstrained = self.unflatten(u) if constrained else {}
        for slot in constrained:
            log_det = self.log_volume_of(slot, unconstrained[slot.name])
            if kept and slot.name in kept:
                flags = without_events(kept[slot.name], len(slot.event_shape))
                assert flags is not None  # `PackedSite.flags`
                log_det = torch.where(flags, log_det, 0.0)
            total = total + self.sum_inner(slot, log_det)
        return total

    def log_volume_of(self, slot: PackedSite, unflattened: Tensor) -> Tensor:
        """Return ``log |dz / du|`` of each entry of one site, without its event dims."""
        log_det = slot.transform.log_abs_det_jacobian(unflattened, slot.transform(unflattened))
        keep = unflattened.dim() - len(slot.event_shape)
        return log_det if log_det.dim() <= keep else log_det.flatten(keep).sum(-1)

    def sum_inner(self, slot: PackedSite, tensor: Tensor) -> Tensor:
        """Sum what each entry of a site contributes over its inner plates, to ``[*batch]``."""
        return self._gather(slot, tensor, 0).sum(-1)

    def _unflatten(self, slot: PackedSite, part: Tensor) -> Tensor:
        """Map ``[*batch, numel]`` to ``[*batch with the inner plates, *unconstrained event]``."""
        events, width = len(slot.event_shape), len(slot.inner_plates)
        inner = [dim for dim, _ in slot.inner_plates]
        dims = range(1 - part.dim(), 0)
        batch = [n for dim, n in zip(dims, part.shape[:-1], strict=True) if dim not in inner]
        sizes = [size for _, size in slot.inner_plates]
        unflattened = part.reshape([*batch, *sizes, *slot.event_shape])
        sources = [i - width - events for i in range(width)]
        unflattened = unflattened.movedim(sources, [dim - events for dim in inner])
        lacking = part.dim() - 1 - self.nesting  # plates around the guide
        own = slot.nesting + events
        if lacking == 0 and unflattened.dim() > own:  # ones, for plates of other sites
            unflattened = unflattened.reshape(unflattened.shape[-own:] if own else ())
        return unflattened

    def _gather(self, slot: PackedSite, unflattened: Tensor, events: int | None = None) -> Tensor:
        """Undo `_unflatten`: bring the inner plates next to the event, leaving ones in place."""
        events = len(slot.event_shape) if events is None else events
        lacking = self.nesting + events - unflattened.dim()
        unflattened = unflattened.reshape((1,) * max(lacking, 0) + unflattened.shape)
        leading = unflattened.dim() - self.nesting - events
        batch = list(unflattened.shape[: leading + self.nesting])
        for dim, _ in slot.inner_plates:
            batch[leading + self.nesting + dim] = 1
        sources = [dim - events for dim, _ in slot.inner_plates]
        width = len(sources)
        moved = unflattened.movedim(sources, [i - width - events for i in range(width)])
        return moved.reshape(*batch, -1)


def _is_mixed(what: str, names: Iterable[str]) -> NotImplementedError:
    return NotImplementedError(
        f"Sites {sorted(names)} are {what}, and whitened coordinates mix all latents. Make a guide "
        "without whiten=."
    )


def same_tensors(support: Any, other: Any) -> bool:
    """Whether the bounds of two supports are equal."""
    pairs = zip(tensors_of(support), tensors_of(other), strict=True)
    return all(torch.equal(one, another) for one, another in pairs)


def latents_of(sites: Iterable[Site], local: bool) -> LatentBlock:
    """Return latent sites of a trace of the model as a block, with rows where it is local."""
    sites = list(sites)
    frames = [{f.name: f for f in plates_of(s).values() if f.vectorized} for s in sites]
    shared = set.intersection(*map(set, frames)) if local else set()
    rows = sorted((frames[0][name] for name in shared), key=lambda frame: frame.dim)
    nesting = max((-f.dim for own in frames for f in own.values()), default=0)
    slots = tuple(_slot(site, shared) for site in sites)
    return LatentBlock(slots, tuple(rows), nesting, local)


def _slot(site: Site, shared: set[str]) -> PackedSite:
    name, fn, value = site["name"], site["fn"], site["value"].detach()
    if fn.support.is_discrete:
        raise NotImplementedError(
            f"Latent site '{name}' is discrete. Enumerate it in the model, or give it a guide "
            "of its own in an AutoGuideList."
        )
    if is_delta(site):
        raise ValueError(f"Latent site '{name}' is a Delta: make it pyro.deterministic.")
    frames = plates_of(site).values()
    inner = [frame for frame in frames if frame.name not in shared]
    for frame in inner:
        if subsample_scale(frame) != 1:
            where = f"Plate '{frame.name}' of latent site '{name}'"
            if not frame.vectorized:
                raise ValueError(f"{where} is a loop over a minibatch. Vectorise it.")
            raise ValueError(
                f"{where} is subsampled ({frame.size} of {frame.full_size}). Give "
                f"plate='{frame.name}'; several such plates need guides in an AutoGuideList."
            )
    is_angle = is_circular(fn)
    transform = _transform(name, fn, is_angle)
    unconstrained = transform.inv(value)
    events = fn.event_dim + unconstrained.dim() - value.dim()
    return PackedSite(
        name=name,
        frames=tuple(frame for frame in frames if frame.vectorized),
        support=plain_support(fn.support),
        transform=transform,
        event_dim=fn.event_dim,
        event_shape=unconstrained.shape[unconstrained.dim() - events :],
        inner_plates=tuple(sorted((f.dim, f.size) for f in inner if f.vectorized)),
        is_angle=is_angle,
        is_fixed=is_fixed(fn, is_angle),
    )


def _transform(name: str, fn: Any, is_angle: bool) -> Transform:
    """Return the transform of a site, or name the remedy where there is no bijection."""
    try:
        return coordinates(fn, is_angle)
    except NotImplementedError as error:
        if bare_support(fn.support) is dist.constraints.sphere:
            remedy = (
                "Use a ProjectedNormal prior and poutine.reparam(model, "
                f"{{'{name}': ProjectedNormalReparam()}}) for guide and loss."
            )
        else:
            remedy = "Sample unconstrained parts, and compute it with pyro.deterministic."
        raise NotImplementedError(
            f"Latent site '{name}' has support {fn.support}, without a bijection from the real "
            f"line. {remedy}"
        ) from error
