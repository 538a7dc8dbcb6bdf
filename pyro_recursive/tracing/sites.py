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
    "check_finite",
    "check_latent",
    "check_match",
    "check_sizes",
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
    """Return the site's log-density under a distribution, without scale and mask.

    Under validation data that are NaN or infinite raise: the next step would end in NaN parameters.
    """
    try:
        log_prob = fn.log_prob(site["value"], *site["args"], **site["kwargs"])
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise _named(site, error) from error
    if site["is_observed"] and is_validation_enabled() and not bool(log_prob.isfinite().all()):
        check_finite(site)
    return log_prob


def _named(site: Site, error: Exception) -> Exception:
    """Return an error of a log-density with what is known of its site, or a clearer one."""
    value = site["value"]
    if not isinstance(value, Tensor):
        return TypeError(_no_tensor(site))
    try:
        check_finite(site)
        check_batch_shape(site, *batch_shapes(site))
    except ValueError as clearer:
        return clearer
    if type(error) is not RuntimeError and not isinstance(error, ValueError):
        return error  # out of memory, say, or a mistake inside a distribution
    dtype = str(value.dtype).removeprefix("torch.")
    remedy = "" if value.is_floating_point() else " Convert the value, e.g. by value.double()."
    place = f"At site '{site['name']}', with a value of shape {list(value.shape)} and type {dtype}"
    return type(error)(f"{place}: {str(error).rstrip('.')}.{remedy}")


def check_finite(site: Site) -> None:
    """Raise where an observed value has NaN or infinities; waits for the device."""
    value = site["value"]
    if not site["is_observed"] or bool((finite := value.isfinite()).all()):
        return
    where = (~finite).nonzero().tolist()
    raise ValueError(
        f"Site '{site['name']}' observes values that are NaN or infinite: {len(where)} of "
        f"{value.numel()}, at {where[:5]}{'...' if len(where) > 5 else ''}. Clean the data, or put "
        "any finite value there and leave it out with pyro.poutine.mask."
    )


def _no_tensor(site: Site) -> str:
    return (
        f"Site '{site['name']}' has a {type(site['value']).__name__} as its value, and needs a "
        "tensor. Convert it with torch.as_tensor."
    )


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
    check_latent(guide)
    check_sizes(model, guide)
    for name in latent.keys() & guided.keys():
        if _masked(latent[name]) and not _masked(guided[name]):
            raise ValueError(
                f"Model site '{name}' is masked and the guide's is not: its log q would stand in "
                "the weights without a log p. Sample it under the same poutine.mask in the guide. "
                "An autoguide cannot: block the site there, and add a guide of your own for it "
                "with pyro.infer.autoguide.AutoGuideList."
            )
    if is_validation_enabled():
        padded = (_with_batch_dims(trace, max_plate_nesting) for trace in (model, guide))
        try:
            check_model_guide_match(*padded, max_plate_nesting)
        except ValueError as error:
            raise ValueError(f"{error}. {_other_plates(latent, guided)}") from error


def check_latent(guide: poutine.Trace) -> None:
    """Raise where a guide observes a site: its density would be part of log q."""
    for site in sites(guide):
        is_own = site["infer"].get("is_auxiliary") or isinstance(site["fn"], dist.Unit)
        if site["is_observed"] and not is_own:
            remedy = "Drop its obs=: data are observed in the model."
            if is_delta(site):
                remedy = "If it is computed by poutine.reparam, put that around the model."
            raise ValueError(
                f"Guide site '{site['name']}' is observed, and its density would stand in the "
                f"weights as if it had been sampled. {remedy}"
            )


def check_sizes(model: poutine.Trace, guide: poutine.Trace) -> None:
    """Raise where a plate has one size in the model and another in the guide."""
    found: dict[str, tuple[int, int]] = {}
    for trace in (model, guide):
        for site in sites(trace):
            for name, frame in plates_of(site).items():
                size = frame.size, frame.full_size or frame.size
                if found.setdefault(name, size) != size:
                    raise ValueError(
                        f"Plate '{name}' has {_entries(*found[name])} where it is met first and "
                        f"{_entries(*size)} at site '{site['name']}'. Make it of the same size, "
                        "full and subsampled, in model and guide: what the guide draws decides "
                        "which entries the model has, and both densities are scaled by it."
                    )


def _entries(size: int, full_size: int) -> str:
    return f"{size} entries" if size == full_size else f"{size} of {full_size} entries"


def _other_plates(latent: dict[str, Site], guided: dict[str, Site]) -> str:
    """Say which sites are in other plates in the guide than in the model."""
    pairs = {
        name: (sorted(plates_of(latent[name])), sorted(plates_of(guided[name])))
        for name in latent.keys() & guided.keys()
    }
    others = [
        f"Site '{name}' is in plates {one} in the model and {other} in the guide."
        for name, (one, other) in pairs.items()
        if one != other
    ]
    remedy = "Give model and guide the same plates at the same dims, and distributions of one shape"
    return " ".join([*others, f"{remedy}."])


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
    plates = {frame.dim: frame for frame in site["cond_indep_stack"]}
    for shape in shapes:
        for dim in range(-len(shape), 0):
            frame = plates.get(dim)
            if frame is not None and shape[dim] not in (1, frame.size):
                raise ValueError(
                    f"Site '{site['name']}' has batch shape {tuple(shape)}, with {shape[dim]} "
                    f"entries at dim {dim}, where plate '{frame.name}' has {frame.size}. Give "
                    "data and plate the same number of rows."
                )
            if shape[dim] != 1 and frame is None:
                raise ValueError(
                    f"Site '{site['name']}' has batch shape {tuple(shape)}, and dim {dim} belongs "
                    "to no plate. Put the site inside a pyro.plate, or use .to_event(...) on its "
                    "distribution. If it is right without the plate of samples on the left, use "
                    "vectorize_particles=False."
                )


def batch_shapes(site: Site) -> list[torch.Size]:
    """Return the shapes that a site's log-density is made of: distribution, value, scale, mask."""
    value = site["value"]
    if not isinstance(value, Tensor):
        raise TypeError(_no_tensor(site))
    tensors = [site[key] for key in ("scale", "mask") if isinstance(site[key], Tensor)]
    batch = value.shape[: value.dim() - site["fn"].event_dim]
    return [site["fn"].batch_shape, batch, *(tensor.shape for tensor in tensors)]
