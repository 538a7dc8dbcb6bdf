"""What the sample sites of traces say: kinds, plates, shapes, and whether model and guide match."""

import itertools
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import site_is_subsample
from pyro.util import check_model_guide_match
from torch import Tensor

__all__ = [
    "PACKED",
    "PARTICLE_PLATE",
    "Site",
    "batch_shapes",
    "check_batch_shape",
    "check_match",
    "independent_plates_of",
    "is_delta",
    "log_prob_of",
    "nesting_of",
    "plates_of",
    "same_scale",
    "sites",
    "subsample_scale",
    "subsample_sites",
]

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


def is_delta(site: Site) -> bool:
    """Whether the site's value is computed, not sampled: a Delta under any wrapping."""
    return any(isinstance(layer, dist.Delta) for layer in _layers(site["fn"]))


def _layers(fn: Any) -> Iterator[Any]:
    """Yield a distribution and what stands under its event dims and masks."""
    yield fn
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
        yield fn


def log_prob_of(site: Site, fn: Any) -> Tensor:
    """Return the site's log-density under a distribution, without scale and mask."""
    try:
        return fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    except ValueError as error:
        raise ValueError(f"At site '{site['name']}': {error}") from error


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


def check_match(model: poutine.Trace, guide: poutine.Trace, max_plate_nesting: int) -> None:
    """Raise where model and guide do not fit together, naming site and remedy."""
    latent = {site["name"]: site for site in sites(model) if not site["is_observed"]}
    guided = {site["name"]: site for site in sites(guide) if not site["is_observed"]}
    for name, site in guided.items():
        if site["infer"].get("enumerate"):
            raise NotImplementedError(
                f"Guide site '{name}' asks for enumeration, which multi-sample bounds do not do. "
                "Drop its infer={'enumerate': ...} (estimator='vimco' handles discrete sites), or "
                "use pyro.infer.TraceEnum_ELBO."
            )
        if name not in latent and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"Guide site '{name}' is no latent site of the model. Sample it in the model too, "
                "or mark it infer={'is_auxiliary': True}."
            )
    for name in latent.keys() - guided.keys():
        if latent[name]["infer"].get("enumerate"):
            raise NotImplementedError(
                f"Model site '{name}' is to be enumerated, which multi-sample bounds do not do. "
                "Use pyro.infer.TraceEnum_ELBO, or sample the site in the guide "
                "(estimator='vimco')."
            )
        raise ValueError(
            f"Model site '{name}' is latent and the guide does not sample it: the bound would be "
            "wrong. Sample it in the guide, or observe it."
        )
    for name in latent.keys() & guided.keys():
        if _masked(latent[name]) and not _masked(guided[name]):
            raise ValueError(
                f"Model site '{name}' is masked and the guide's is not: its log q would stand in "
                "the weights without a log p. Sample it under the same poutine.mask in the guide. "
                "An autoguide cannot: block the site there, and add a guide of your own for it "
                "with pyro.infer.autoguide.AutoGuideList."
            )
    if is_validation_enabled():
        model, guide = (_with_batch_dims(trace, max_plate_nesting) for trace in (model, guide))
        check_model_guide_match(model, guide, max_plate_nesting)


def _with_batch_dims(trace: poutine.Trace, max_plate_nesting: int) -> poutine.Trace:
    """Give all batch dims to events of two dims or more, which Pyro's check would cut into."""
    padded = trace
    for site in sites(trace):
        batch, event_dim = site["fn"].batch_shape, site["fn"].event_dim
        if max_plate_nesting - event_dim < len(batch) < max_plate_nesting and event_dim > 1:
            padded = trace.copy() if padded is trace else padded
            shape = (1,) * (max_plate_nesting - len(batch)) + tuple(batch)
            padded.nodes[site["name"]] = {**site, "fn": site["fn"].expand(shape)}
    return padded


def _masked(site: Site) -> bool:
    """Whether a mask leaves out any of a site's density."""
    masks = [site["mask"], *(getattr(layer, "_mask", None) for layer in _layers(site["fn"]))]
    return any(m is False or (isinstance(m, Tensor) and not bool(m.all())) for m in masks)


def check_batch_shape(site: Site, *shapes: torch.Size) -> None:
    """Raise where a batch dim belongs to no plate: it would be summed or shared in silence."""
    dims = {frame.dim for frame in site["cond_indep_stack"]}
    for shape in shapes:
        for dim in range(-len(shape), 0):
            if shape[dim] != 1 and dim not in dims:
                raise ValueError(
                    f"Site '{site['name']}' has batch shape {tuple(shape)}, and dim {dim} belongs "
                    "to no plate. Put the site inside a pyro.plate, or use .to_event(...) on its "
                    "distribution. If it is right without the plate of samples on the left, use "
                    "vectorize_particles=False."
                )


def batch_shapes(site: Site) -> list[torch.Size]:
    """Return the shapes that a site's log-density is made of: distribution, value, scale, mask."""
    value = site["value"]
    tensors = [site[key] for key in ("scale", "mask") if isinstance(site[key], Tensor)]
    batch = value.shape[: value.dim() - site["fn"].event_dim]
    return [site["fn"].batch_shape, batch, *(tensor.shape for tensor in tensors)]
