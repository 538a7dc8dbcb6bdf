"""The sample sites of traces: their kinds, plates, scales and masks."""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

Site = dict[str, Any]

PARTICLE_PLATE = "num_particles_vectorized"  # the name that Pyro's own losses use
PACKED = "packed_plates"  # in a guide site's infer: plates whose entries have one joint density
MODEL_MASK = "model_mask"  # there, too: the mask of the model's site, which the density uses
LEAVES_OUT = "leaves_out"  # and whether the density leaves out masked entries
SUMMED = "summed_out"  # in a model site's infer: whether the site is enumerated, not sampled
JOINT = "joint_draw"  # in a guide site's infer: the `JointDraw` that its value is a part of


@dataclass(frozen=True)
class JointDraw:
    """A packed vector ``[*batch, D]`` and the sites whose values are functions of it alone.

    ``values`` are those that it gives; another value at a site comes from elsewhere.
    """

    vector: Tensor
    values: dict[str, Tensor]

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.values)


@dataclass(slots=True)
class SiteRecord:
    """A sample site that has a density.

    ``group`` is "model" for the model's sites; those of the guide are "density" where they are
    reparameterised, "score" where they are sampled otherwise, "jacobian" where they are computed
    from other sites, and "values" where each of their values has samples of its own. ``plates`` are
    the frames of its plates by name, ``row_plates`` those whose entries have densities of their
    own, both without the particle plate, ``sizes`` the sizes of all by dim. The site or its
    distribution may have a mask, and one of its plates a subsample.
    """

    name: str
    site: Site
    group: str
    plates: dict[str, Any]
    row_plates: dict[str, Any]
    sizes: dict[int, int]
    is_masked: bool
    is_subsampled: bool


@dataclass(frozen=True)
class PlateDependence:
    """What depends on latents inside a plate and may not: nothing, if its entries are independent.

    ``outside`` are sites outside the plate, each "model" or "guide"; ``coupled`` are sites inside
    whose density in one entry depends on latents of another. ``summed`` are those of both kinds
    that depend so on an enumerated latent, in a plate that is no loop.
    """

    outside: dict[str, str] = field(default_factory=dict)
    coupled: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.outside or self.coupled)

    def __or__(self, other: "PlateDependence") -> "PlateDependence":
        in_guide = {name: where for name, where in self.outside.items() if where == "guide"}
        outside = {**self.outside, **other.outside, **in_guide}
        return PlateDependence(
            outside, (*self.coupled, *other.coupled), (*self.summed, *other.summed)
        )


class SiteTable:
    """The sites of a pair of traces, found in one pass.

    ``model`` and ``guide`` have the sites with a density; ``nesting`` is how many dims to the right
    the plates of both traces use, the particle plate aside. ``dependence`` has the plates whose
    entries were tested for independence. With ``by_value`` the guide ran on each value of its
    enumerated latents; otherwise it sampled them.
    """

    def __init__(self, model: poutine.Trace, guide: poutine.Trace, by_value: bool = False) -> None:
        self.traces = model, guide
        self.model: list[SiteRecord] = []
        self.guide: list[SiteRecord] = []
        self.nesting = 0
        for trace, records in ((model, self.model), (guide, self.guide)):
            for name, site in trace.nodes.items():
                if site["type"] != "sample":
                    continue
                plates, sizes, is_subsampled = {}, {}, False
                for frame in site["cond_indep_stack"]:
                    sizes[frame.dim] = frame.size
                    if frame.name != PARTICLE_PLATE:
                        plates[frame.name] = frame
                        is_subsampled |= frame.full_size not in (None, frame.size)
                        if frame.vectorized:  # deterministic sites too: their plates take dims
                            self.nesting = max(self.nesting, -frame.dim)
                infer = site["infer"]
                if site_is_subsample(site) or infer.get("_deterministic"):
                    continue
                *outer, base = layers(site["fn"])
                is_masked = any(isinstance(layer, dist.MaskedDistribution) for layer in outer)
                group, has_rsample = "model", site["fn"].has_rsample
                if records is self.guide:
                    group = "density" if has_rsample else "score"
                    if isinstance(base, dist.Delta) or (site["is_observed"] and has_rsample):
                        group = "jacobian"
                    if by_value and is_marked_in_guide(site):
                        group = "values"
                rows = plates
                if packed := infer.get(PACKED):
                    rows = {name: frame for name, frame in plates.items() if name not in packed}
                is_masked |= site["mask"] is not None
                records.append(
                    SiteRecord(name, site, group, plates, rows, sizes, is_masked, is_subsampled)
                )
        self.records = [*self.model, *self.guide]
        self.dependence: dict[str, PlateDependence] = {}

    @property
    def enumerated(self) -> list[SiteRecord]:
        """The model's latents that are to be enumerated: marked, and not sampled by the guide."""
        guided = {record.name for record in self.guide}
        return [
            record
            for record in self.model
            if record.site["infer"].get("enumerate")
            and not record.site["is_observed"]
            and record.name not in guided
        ]

    @property
    def enumerated_in_guide(self) -> list[SiteRecord]:
        """The guide's latents that are to be enumerated, see `is_marked_in_guide`."""
        return [record for record in self.guide if is_marked_in_guide(record.site)]

    def note(self, dependence: dict[str, PlateDependence]) -> None:
        """Note what is known of plates: entries that depend on each other are no rows."""
        self.dependence = dependence
        for record in self.records if self.coupled else ():
            rows = record.row_plates.items()
            record.row_plates = {name: frame for name, frame in rows if name not in self.coupled}

    @property
    def coupled(self) -> dict[str, str]:
        """The plates whose entries depend on each other, and a site that shows it."""
        found = self.dependence.items()
        return {name: each.coupled[0] for name, each in found if each.coupled}


def is_marked_in_guide(site: Site) -> bool:
    """Whether a guide's latent is marked for enumeration.

    Marks of auxiliary sites have no effect: the model has no density of their values.
    """
    infer = site["infer"]
    is_latent = not site["is_observed"] and not infer.get("is_auxiliary")
    return is_latent and bool(infer.get("enumerate"))


def with_plate_sizes(trace: poutine.Trace) -> poutine.Trace:
    """Give plates without a size (``pyro.plate("data")``) that of their sites; return the trace.

    Pyro does not broadcast sites in such a plate: one whose batch has a single entry there has one
    density for all entries of the others, and is outside of it in effect. Frames of such plates
    have no ``full_size`` here.
    """
    found = [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.size == -1
    ]
    sizes: dict[str, int] = {}
    for site in found:
        for frame in site["cond_indep_stack"]:
            sizes[frame.name] = max(sizes.get(frame.name, 1), entries_at(site, frame))
    for site in found:
        stack = []
        for frame in site["cond_indep_stack"]:
            if frame.size != -1:
                stack.append(frame)
            elif entries_at(site, frame) > 1 or sizes[frame.name] == 1:
                stack.append(_sized(frame, sizes[frame.name]))
        site["cond_indep_stack"] = tuple(stack)
    return trace


def _sized(frame: Any, size: int) -> Any:
    return frame._replace(size=size, full_size=None)


def sized_by(site: Site, frame: Any) -> Any:
    """Return a plate's frame; one without a size has that of this site alone."""
    return _sized(frame, entries_at(site, frame)) if frame.size == -1 else frame


def entries_at(site: Site, frame: Any) -> int:
    """Return how many entries a site has at a plate's dim."""
    fn, value = site["fn"], site["value"]
    shapes = [fn.batch_shape]
    if isinstance(value, Tensor):
        shapes.append(value.shape[: value.dim() - fn.event_dim])
    return max(shape[frame.dim] if len(shape) >= -frame.dim else 1 for shape in shapes)


def sites(*traces: poutine.Trace) -> list[Site]:
    """Return the sample sites that carry a density: no subsample and no deterministic sites."""
    return [
        site
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    ]


def latent_sites(trace: poutine.Trace) -> list[Site]:
    """Return the sites that have a density and are not observed."""
    return [site for site in sites(trace) if not site["is_observed"]]


def is_delta(site: Site) -> bool:
    """Whether the site's value is computed, not sampled: a Delta under any wrapping."""
    return isinstance(layers(site["fn"])[-1], dist.Delta)


def layers(fn: Any) -> list[Any]:
    """Return a distribution and what stands under its event dims and masks, from the outside."""
    found = [fn]
    while _is_wrapper(found[-1].__class__):
        found.append(found[-1].base_dist)
    return found


@cache
def _is_wrapper(kind: Any) -> bool:
    return issubclass(kind, dist.Independent | dist.MaskedDistribution)


def mask_of(site: Site) -> Tensor | None:
    """Return which entries of a site have a density, to broadcast with its value; None for all."""
    found = [(site["mask"], site["fn"].event_dim)]
    for layer in layers(site["fn"]):
        if isinstance(layer, dist.MaskedDistribution):
            found.append((layer._mask, layer.event_dim))
    total = None
    for mask, event_dim in found:
        if mask is not None and mask is not True:
            each = torch.as_tensor(mask, device=site["value"].device)
            each = each.reshape(each.shape + (1,) * event_dim)
            total = each if total is None else total & each
    return total


def entry_mask_of(site: Site) -> Tensor | None:
    """Return which entries of a site's plates have a density; None for all.

    A mask under event dims leaves out parts of entries, not whole ones.
    """
    fn, masks = site["fn"], [site["mask"]]
    while isinstance(fn, dist.MaskedDistribution):
        fn, masks = fn.base_dist, [*masks, fn._mask]
    total = None
    for mask in masks:
        if mask is not None and mask is not True:
            each = torch.as_tensor(mask, device=site["value"].device)
            total = each if total is None else total & each
    return total


def unmasked(fn: Any) -> Any:
    """Return a distribution without the masks under its event dims."""
    if isinstance(fn, dist.MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, dist.Independent):
        base = unmasked(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    return fn


def at_zero(fn: Any, transform: Any) -> Tensor:
    """Return the value of a distribution at zero in unconstrained space, without a draw."""
    like = next(tensors_of(fn), torch.empty(()))
    shape = transform.inverse_shape(fn.shape())
    return transform(torch.zeros(shape, dtype=like.dtype, device=like.device))


def tensors_of(fn: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a distribution, of its support and of its parts."""
    for value in vars(fn).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, torch.distributions.Distribution | constraints.Constraint):
            yield from tensors_of(value)


def plates_of(site: Site) -> dict[str, Any]:
    """Return the frames of a site's plates by name, the particle plate aside."""
    return {f.name: f for f in site["cond_indep_stack"] if f.name != PARTICLE_PLATE}


def independent_plates_of(site: Site) -> dict[str, Any]:
    """Return the frames of a site's plates whose entries have densities of their own."""
    packed = site["infer"].get(PACKED, ())
    return {name: frame for name, frame in plates_of(site).items() if name not in packed}


def entry_of(frame: Any) -> int:
    """Return the iteration of a sequential plate.

    Pyro's counter continues when a plate is iterated again, hence the modulo.
    """
    return (frame.counter - 1) % frame.size


def subsample_scale(frame: Any) -> float:
    """Return ``full_size / size`` of a plate."""
    return 1.0 if frame.full_size is None else frame.full_size / frame.size


def own_scale(site: Site, plates: Container[str] | None = None) -> Any:
    """Return a site's scale without the subsample scales of its plates, or of those named."""
    scale = site["scale"]
    for frame in site["cond_indep_stack"]:
        if plates is None or frame.name in plates:
            scale = scale / subsample_scale(frame)
    return scale


def nesting_of(trace: poutine.Trace) -> int:
    """Return how many dims to the right the plates of a trace use, the particle plate aside."""
    found = [site for site in trace.nodes.values() if site["type"] == "sample"]
    frames = [frame for site in found for frame in plates_of(site).values() if frame.vectorized]
    return max((-frame.dim for frame in frames), default=0)


def same_scale(one: Any, other: Any, *, values: bool = True) -> bool:
    """Whether two scales are equal, as Pyro asks of all that is enumerated together.

    Of tensors the shapes are compared, and the ``values`` where asked: that waits for the device.
    """
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        return math.isclose(one, other, rel_tol=1e-9)
    if one is other:
        return True
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.shape == other.shape and (not values or bool((one == other.to(one)).all()))


def subsample_sites(*traces: poutine.Trace) -> poutine.Trace:
    """Return the minibatch of traces as a trace of their subsample sites, for replay."""
    chosen = poutine.Trace()
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and site_is_subsample(site) and name not in chosen.nodes:
                chosen.add_node(name, **site)
    return chosen
