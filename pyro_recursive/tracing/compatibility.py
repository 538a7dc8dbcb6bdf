"""Whether model, guide and plates fit: every refusal and warning that follows from their sites."""

import warnings
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.util import check_model_guide_match
from torch import Tensor

from pyro_recursive.tracing.plates import PlateLayout, ProgramStructure, local_sites, plates_of_data
from pyro_recursive.tracing.sites import (
    Site,
    SiteTable,
    is_delta,
    layers,
    plates_of,
    sites,
    subsample_scale,
)


def check_match(table: SiteTable, max_plate_nesting: int) -> None:
    """Raise where model and guide do not fit together, naming site and remedy."""
    model, guide = table.traces
    latent = {site["name"]: site for site in table.model if not site["is_observed"]}
    guided = {site["name"]: site for site in table.guide if not site["is_observed"]}
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
    masks = [site["mask"], *(getattr(layer, "_mask", None) for layer in layers(site["fn"]))]
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


def no_tensor(site: Site) -> TypeError:
    """Return the error for a site whose value is no tensor."""
    return TypeError(
        f"Site '{site['name']}' has a {type(site['value']).__name__} as its value, and needs a "
        "tensor. Convert it with torch.as_tensor."
    )


def batch_shapes(site: Site) -> list[torch.Size]:
    """Return the shapes that a site's log-density is made of: distribution, value, scale, mask."""
    value = site["value"]
    if not isinstance(value, Tensor):
        raise no_tensor(site)
    tensors = [site[key] for key in ("scale", "mask") if isinstance(site[key], Tensor)]
    batch = value.shape[: value.dim() - site["fn"].event_dim]
    return [site["fn"].batch_shape, batch, *(tensor.shape for tensor in tensors)]


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


def check_subsampling(table: SiteTable, layout: PlateLayout) -> None:
    """Raise where a subsampled plate does not enclose every site; the bound must be linear then."""
    found = half_subsampled(table, layout)
    if found is not None:
        frame, outside = found
        raise ValueError(
            f"Plate '{frame.name}' is subsampled ({frame.size} of {frame.full_size}) but does "
            f"not enclose site '{outside}'. The logarithm of a mean over '{outside}' has "
            "no unbiased estimate from a minibatch. Use global_latents='elbo' (ELBO for "
            "the global latents, this bound for the local ones), full data, or Trace_ELBO."
        )


def half_subsampled(table: SiteTable, layout: PlateLayout) -> tuple[Any, str] | None:
    """Return the frame of a subsampled plate that does not enclose every site, and such a site."""
    shared = {frame.name for frame in layout.plates}
    everything = [*table.model, *table.guide]
    for site in everything:
        for name, frame in plates_of(site).items():
            if name not in shared and subsample_scale(frame) != 1:
                return frame, next(s["name"] for s in everything if name not in plates_of(s))
    return None


def warn_if_nothing_local(
    structure: ProgramStructure, num_estimates: int, num_particles: int
) -> None:
    """Warn where global_latents='elbo' leaves no latent that the K samples could differ in."""
    local = local_sites(structure)
    everything = [*structure.model.values(), *structure.guide.values()]
    if any(site["name"] in local and not site["is_observed"] for site in everything):
        return
    plates = ", ".join(f"'{name}'" for name in sorted(plates_of_data(structure)))
    warnings.warn(
        f"No latent site is inside plate {plates}, so that under global_latents='elbo' the "
        f"{num_particles} samples inside a logarithm are one: this is the ELBO with "
        f"{num_estimates} sample{'s' * (num_estimates > 1)}. Trace_ELBO is the same for less; "
        "global_latents='joint', with all data in each step, is tighter.",
        stacklevel=4,
    )


def warn_if_joint(table: SiteTable, layout: PlateLayout) -> None:
    """Warn where one weight covers the whole data set although there are local latents."""
    if layout.plates:
        return
    latent = [site for site in table.model if not site["is_observed"]]
    for site in table.model:
        for name, frame in plates_of(site).items():
            local = next((s["name"] for s in latent if name in plates_of(s)), None)
            if site["is_observed"] and local and frame.size > 1:
                outside = next((s["name"] for s in latent if name not in plates_of(s)), None)
                if outside is None:
                    cause = ", and the guide has one joint density over its entries"
                    remedy = "A guide with plate= or an encoder gives each entry its own."
                else:
                    cause = f" but not '{outside}'"
                    remedy = "global_latents='elbo' gives each entry its own."
                warnings.warn(
                    f"Plate '{name}' encloses latent site '{local}'{cause}, so that all its "
                    f"{frame.size} entries share one joint weight: a valid bound, but the more "
                    f"entries the looser. {remedy}",
                    stacklevel=4,
                )
                return
