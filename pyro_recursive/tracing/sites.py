"""What the sample sites of traces say: kinds, plates, shapes, and whether model and guide match."""

import itertools
from collections.abc import Container, Iterator
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Site = dict[str, Any]

PARTICLE_PLATE = "num_particles_vectorized"  # the name that Pyro's own losses use
PACKED = "packed_plates"  # in a guide site's infer: plates whose entries have one joint density


def sites(*traces: poutine.Trace) -> Iterator[Site]:
    """Yield the sample sites that carry a density: no subsample and no deterministic sites."""
    for site in itertools.chain.from_iterable(trace.nodes.values() for trace in traces):
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if not site["infer"].get("_deterministic"):
            yield site


class SiteTable:
    """The sample sites of a pair of traces."""

    def __init__(self, model: poutine.Trace, guide: poutine.Trace) -> None:
        self.traces = model, guide
        self.model, self.guide = list(sites(model)), list(sites(guide))


def is_delta(site: Site) -> bool:
    """Whether the site's value is computed, not sampled: a Delta under any wrapping."""
    return any(isinstance(layer, dist.Delta) for layer in layers(site["fn"]))


def layers(fn: Any) -> Iterator[Any]:
    """Yield a distribution and what stands under its event dims and masks."""
    yield fn
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
        yield fn


def plates_of(site: Site) -> dict[str, Any]:
    """Return the frames of a site's plates by name, the particle plate aside."""
    return {f.name: f for f in site["cond_indep_stack"] if f.name != PARTICLE_PLATE}


def independent_plates_of(site: Site) -> dict[str, Any]:
    """Return the frames of a site's plates whose entries have densities of their own."""
    packed = site["infer"].get(PACKED, ())
    return {name: frame for name, frame in plates_of(site).items() if name not in packed}


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


def nesting_of(*traces: poutine.Trace) -> int:
    """Return how many dims to the right the plates of traces use, the particle plate aside."""
    return max(
        (
            -frame.dim
            for trace in traces
            for site in trace.nodes.values()  # deterministic ones too: their plates take dims
            if site["type"] == "sample"
            for frame in plates_of(site).values()
            if frame.vectorized
        ),
        default=0,
    )


def same_scale(one: Site, other: Site) -> bool:
    """Whether two sites have one scale, as Pyro asks of all that is enumerated together."""
    scales = one["scale"], other["scale"]
    if any(isinstance(scale, Tensor) for scale in scales):
        return scales[0] is scales[1]
    return float(scales[0]) == float(scales[1])


def subsample_sites(*traces: poutine.Trace) -> poutine.Trace:
    """Return the minibatch of traces as a trace of their subsample sites, for replay."""
    chosen = poutine.Trace()
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and site_is_subsample(site) and name not in chosen.nodes:
                chosen.add_node(name, **site)
    return chosen
