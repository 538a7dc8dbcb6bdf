"""Whether model, guide and plates fit: every refusal and warning that follows from their sites."""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_recursive.tracing.guide_values import outside_of_plates
from pyro_recursive.tracing.handlers import ComponentIndex
from pyro_recursive.tracing.plates import PlateLayout, ProgramStructure, data_plates
from pyro_recursive.tracing.sites import (
    PACKED,
    PARTICLE_PLATE,
    PlateDependence,
    Site,
    SiteRecord,
    SiteTable,
    is_delta,
    layers,
)
from pyro_recursive.tracing.supports import bare_support, is_circular
from pyro_recursive.tracing.transforms import PERIOD
from pyro_recursive.tracing.user_warnings import warn_user


def check_runs(tables: Sequence[SiteTable], layout: PlateLayout, *, is_linear: bool) -> None:
    """Raise where the sites of runs do not fit together or, under a nonlinear bound, the plates."""
    for table in tables:
        check_match(table, layout.max_plate_nesting)
    _check_factors(tables[0], layout)
    if layout.particles.values and (record := outside_of_plates(tables[0], layout)) is not None:
        raise NotImplementedError(
            f"Guide site '{record.name}' is enumerated in plates {sorted(record.plates)}, and the "
            f"weights have plates {sorted(layout.names)}. Use global_latents='elbo' if a global "
            "latent is the reason, or enumerate it in the model."
        )
    if not is_linear:
        if any(record.is_subsampled for record in tables[0].records):
            check_subsampling(tables[0], layout)
        if tables[0].coupled:
            _warn_if_coupled(tables[0])
        elif not layout.plates:
            _warn_if_joint(tables[0])


def check_match(table: SiteTable, max_plate_nesting: int) -> None:
    """Raise where the sites of model and guide do not fit together."""
    latent = {record.name: record for record in table.model if not record.site["is_observed"]}
    guided = {record.name: record for record in table.guide if not record.site["is_observed"]}
    for name, record in {**latent, **guided}.items():
        infer = record.site["infer"]
        if name not in guided:
            if infer.get("enumerate"):  # summed out
                continue
            raise ValueError(f"Model site '{name}' is latent and the guide does not sample it.")
        if name not in latent and not infer.get("is_auxiliary"):
            raise ValueError(
                f"Guide site '{name}' is no latent site of the model: mark it is_auxiliary."
            )
    check_latent(record.site for record in table.guide)
    check_sizes(table)
    _check_summed(table)
    check_shapes = is_validation_enabled()
    for name in latent.keys() & guided.keys():
        one, other = latent[name], guided[name]
        if not is_delta(one.site) and is_circular(one.site["fn"]):
            _check_angle(other, guided.values())
        if check_shapes:
            _check_shapes(one, other, max_plate_nesting)


def _check_summed(table: SiteTable) -> None:
    """Raise where entries of a plate depend on enumerated latents of others, which are summed."""
    for plate, found in table.dependence.items():
        if found.summed:
            inside = next(r.name for r in table.enumerated if plate in r.plates)
            where = "" if found.summed[0] in found.coupled else f", outside plate '{plate}',"
            raise ValueError(
                f"The density of '{found.summed[0]}'{where} changes with enumerated latents in "
                f"other entries of plate '{plate}': the sum does not split by entry. Sample "
                f"'{inside}' in the guide."
            )


def check_enumerable(site: Site, *, in_guide: bool = False) -> None:
    """Raise where not all values of a site can be enumerated."""
    name, number = site["name"], site["infer"].get("num_samples")
    remedy = "Drop infer={'enumerate'}" if in_guide else f"Sample '{name}' in the guide"
    if number is not None:
        raise NotImplementedError(
            f"Site '{name}' has infer={{'num_samples': {number}}}: a sampled sum inside the "
            f"logarithm has another bound and no gradient. {remedy}, or drop num_samples."
        )
    if not site["fn"].has_enumerate_support:
        raise NotImplementedError(
            f"Site '{name}' is enumerated, and {type(site['fn']).__name__} has no finite support. "
            f"{remedy}."
        )


def check_global_elbo(
    structure: ProgramStructure,
    dependence: dict[str, PlateDependence],
    local: frozenset[str],
    num_particles: int,
) -> bool:
    """Return whether global and local sites can be separated.

    They cannot where the density of a global site depends on local latents, as far as a test shows;
    with several samples that raises. With one they need not be: it is not done where a global site
    is enumerated, as it is summed together with those that depend on it, or has one expectation
    with them.
    """
    in_guide = structure.guide_values.keys() - local
    if num_particles == 1 and (in_guide or structure.enumerated - local):
        return False
    if in_guide:
        raise NotImplementedError(
            f"Guide site '{min(in_guide)}' is enumerated outside the plates of the data, and "
            "global_latents='elbo' has no expectation over it. Use global_latents='joint', or "
            "enumerate it in the model."
        )
    for plate in sorted(data_plates(structure.model.values()) & dependence.keys()):
        found = dependence[plate]
        apart = found.outside.keys() - local - {*found.summed}  # of the latter `check_match` tells
        name, where = next(((n, found.outside[n]) for n in sorted(apart)), (None, None))
        if name is None:
            continue
        if num_particles == 1:
            return False
        raise ValueError(
            f"The density of '{name}', outside plate '{plate}', depends on latents inside it (in "
            f"the {where}), so this value could exceed log p(x). Sample '{name}' before the plate, "
            "or use global_latents='joint'."
        )
    return True


def check_latent(guide: Iterable[Site]) -> None:
    """Raise where a guide observes a site, or has a `pyro.factor` of no kind.

    The density of what is observed would be part of log q.
    """
    for site in guide:
        factor = layers(site["fn"])[-1]
        if isinstance(factor, dist.Unit) and "has_rsample" not in vars(factor):
            raise ValueError(
                f"Guide factor '{site['name']}' needs has_rsample: True for a function of "
                "reparameterised draws (a Jacobian), False for log q of other draws."
            )
        if site["is_observed"] and not isinstance(site["fn"], dist.Unit | ComponentIndex):
            remedy = "put poutine.reparam around the model" if is_delta(site) else "drop its obs="
            raise ValueError(f"Guide site '{site['name']}' is observed: {remedy}.")


def check_angle(site: Site) -> None:
    """Raise where a guide's density of an angle is not over one period alone."""
    fn = site["fn"]
    if PACKED in site["infer"] or is_circular(fn):
        return
    bare = bare_support(fn.support)
    low, high = (getattr(bare, f"{end}_bound", math.inf) for end in ("lower", "upper"))
    if not bool(torch.as_tensor(high - low < PERIOD + 1e-4).all()):
        raise ValueError(
            f"Site '{site['name']}' is an angle, and the guide's density is over the real line. "
            "Use VonMises there, AmortizedGuide, FlowGuide or a mixture of these."
        )


def _check_angle(record: SiteRecord, guide: Iterable[SiteRecord]) -> None:
    """Raise as `check_angle`; a computed angle has the density of auxiliary sites, if any."""
    fn, site = layers(record.site["fn"])[-1], record.site
    if not is_delta(site):
        check_angle(site)
    elif not bool(torch.as_tensor(fn.log_density != 0).any()):
        sampled = [other for other in guide if other.group in ("density", "score")]
        if any(other.site["infer"].get("is_auxiliary") for other in sampled):
            check_angle(site)


def _check_factors(table: SiteTable, layout: PlateLayout) -> None:
    """Raise where a guide draws a value by hand for all samples together.

    A score function needs a draw for each: the others are its baseline.
    """
    dim = layout.particles.dim
    for record in table.guide:
        factor = layers(record.site["fn"])[-1]
        if dim is None or record.group != "score" or not isinstance(factor, dist.Unit):
            continue
        log_q = factor.log_factor
        if log_q.requires_grad and log_q.shape[dim] > 1 and log_q.stride(dim) == 0:
            raise ValueError(
                f"Guide factor '{record.name}' with has_rsample=False has one value for all "
                "samples: use vectorize_particles=False, or has_rsample=True for a Jacobian."
            )


def check_sizes(table: SiteTable) -> None:
    """Raise where a plate has one size in the model and another in the guide."""
    known: dict[str, tuple[str, int, int]] = {}
    for record in table.records:
        where = "model" if record.group == "model" else "guide"
        for name, frame in record.plates.items():
            own = frame.size, frame.full_size or frame.size
            first, *sizes = known.setdefault(name, (where, *own))
            if tuple(sizes) != own:
                remedy = "" if name in record.row_plates else ": make a new guide, or an encoder"
                raise ValueError(
                    f"Plate '{name}' has {sizes[0]} of {sizes[1]} entries in the {first} and "
                    f"{own[0]} of {own[1]} in the {where}, at site '{record.name}'{remedy}."
                )


def _check_shapes(model: SiteRecord, guide: SiteRecord, max_plate_nesting: int) -> None:
    found = []
    for record in (model, guide):
        fn, value = record.site["fn"], record.site["value"]
        shape = fn.batch_shape
        if len(shape) > max_plate_nesting + 1:  # given enumerated values, in a plate without a size
            shape = torch.broadcast_shapes(shape, value.shape[: value.dim() - fn.event_dim])
        batch = [1] * max_plate_nesting + list(shape)
        found.append((batch[len(batch) - max_plate_nesting :], list(fn.event_shape)))
    if found[0] != found[1]:
        raise ValueError(
            f"Model and guide disagree at site '{model.name}': shapes {found[0]} in plates "
            f"{sorted(model.plates)}, {found[1]} in plates {sorted(guide.plates)}."
        )


def check_likelihood(model: poutine.Trace) -> None:
    """Raise for `pyro.contrib.gp`'s variational models, whose likelihood contains the guide.

    Their model reads the guide's parameters, and observes under an expectation over the guide.
    """
    if "pyro.contrib.gp.models.vgp" not in sys.modules:
        return
    params = {n.rpartition(".")[2] for n, site in model.nodes.items() if site["type"] == "param"}
    if {"f_loc", "f_scale_tril"} <= params or {"u_loc", "u_scale_tril"} <= params:
        raise NotImplementedError(
            "The likelihood of pyro.contrib.gp's variational models is an expectation over the "
            "guide, so that importance weights are wrong. Use Trace_ELBO or TraceMeanField_ELBO."
        )


def check_batch_shape(site: Site, *shapes: torch.Size) -> None:
    """Raise where a batch dim belongs to no plate: it would be summed or shared in silence."""
    plates = {frame.dim: frame for frame in site["cond_indep_stack"]}
    for shape in shapes:
        for dim in range(-len(shape), 0):
            frame = plates.get(dim)
            if frame is not None and shape[dim] not in (1, frame.size):
                raise ValueError(
                    f"Site '{site['name']}' has batch shape {tuple(shape)}, but plate "
                    f"'{frame.name}' has {frame.size} rows at dim {dim}."
                )
            if shape[dim] != 1 and frame is None:
                in_one_pass = any(each.name == PARTICLE_PLATE for each in plates.values())
                remedy = "pyro.plate, .to_event() or vectorize_particles=False"
                raise ValueError(
                    f"Site '{site['name']}' has batch shape {tuple(shape)}, and dim {dim} belongs "
                    f"to no plate: use {remedy if in_one_pass else 'pyro.plate or .to_event()'}."
                )


def check_batch_shapes(sites: Iterable[Site]) -> None:
    """Raise where a batch dim belongs to no plate; of observed sites under validation alone.

    Without validation Pyro's losses sum such dims of observed sites, which is right.
    """
    for site in sites:
        if not site["is_observed"] or is_validation_enabled():
            check_batch_shape(site, *batch_shapes(site))


def batch_shapes(site: Site) -> list[torch.Size]:
    """Return the shapes that a site's log-density is made of: distribution, value, scale, mask."""
    value = site["value"]
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"Site '{site['name']}' has a {kind} as its value: use torch.as_tensor.")
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
        f"{value.numel()}, at {where[:5]}. Clean the data, or put numbers there "
        "and pyro.poutine.mask around the site."
    )


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


def masked_log_prob(site: Site) -> Tensor:
    """Return the site's log-density with its mask and without its scale."""
    return scale_and_mask(log_prob_of(site, site["fn"]), mask=site["mask"])


def _named(site: Site, error: Exception) -> Exception:
    """Return an error of a log-density with what is known of its site, or a clearer one."""
    try:
        shapes = batch_shapes(site)
        check_finite(site)
        check_batch_shape(site, *shapes)
    except (TypeError, ValueError) as clearer:
        return clearer
    if type(error) is not RuntimeError and not isinstance(error, ValueError):
        return error  # out of memory, say, or a mistake inside a distribution
    value = site["value"]
    remedy = "" if value.is_floating_point() else " Convert the value to floating point."
    return type(error)(
        f"At site '{site['name']}', with a value of shape {list(value.shape)} and type "
        f"{value.dtype}: {str(error).rstrip('.')}.{remedy}"
    )


def check_subsampling(table: SiteTable, layout: PlateLayout) -> None:
    """Raise where a subsampled plate does not enclose every site; the bound must be linear then."""
    found = half_subsampled(table, layout)
    if found is not None:
        frame, outside = found
        problem = f"does not enclose site '{outside}'. Use global_latents='elbo', full data, or"
        if any(record.name == outside for record in table.enumerated):
            problem = f"does not enclose site '{outside}', which is enumerated. Use full data or"
        if frame.name in table.coupled:
            site = table.coupled[frame.name]
            problem = f"the density of '{site}' in one entry depends on others. Use full data or"
        raise ValueError(
            f"Plate '{frame.name}' is subsampled ({frame.size} of {frame.full_size}) but {problem} "
            "Trace_ELBO."
        )


def check_all_data(table: SiteTable, num_globals: int) -> None:
    """Raise where a plate is subsampled: the logarithm is over all data."""
    for record in table.records:
        for name, frame in record.plates.items() if record.is_subsampled else ():
            if frame.full_size not in (None, frame.size):
                raise ValueError(
                    f"num_globals={num_globals} takes a logarithm over all data: plate '{name}' is "
                    f"subsampled ({frame.size} of {frame.full_size}). Use num_globals=1 or all "
                    "data."
                )


def half_subsampled(table: SiteTable, layout: PlateLayout) -> tuple[Any, str] | None:
    """Return the frame of a subsampled plate that does not enclose every site, and such a site."""
    for record in table.records:
        if record.is_subsampled:
            for name, frame in record.plates.items():
                if name not in layout.names and frame.full_size not in (None, frame.size):
                    return frame, next(r.name for r in table.records if name not in r.row_plates)
    return None


def _warn_if_coupled(table: SiteTable) -> None:
    for name, site in table.coupled.items():
        if all(name in record.plates for record in table.records):
            warn_user(
                f"Entries of plate '{name}' are coupled: the density of '{site}' in one depends on "
                "latents of others. All share one joint weight.",
            )


def _warn_if_joint(table: SiteTable) -> None:
    """Warn where one weight covers the whole data set although there are local latents."""
    latent = [record for record in table.model if not record.site["is_observed"]]
    summed = {record.name for record in table.enumerated}
    sampled = [record for record in latent if record.name not in summed]
    for record in table.model:
        for name, frame in record.plates.items() if record.site["is_observed"] else ():
            local = next((other.name for other in sampled if name in other.plates), None)
            if local is None or frame.size == 1:
                continue
            outside = [other.name for other in (*latent, *table.model) if name not in other.plates]
            if not outside:
                cause = ", over which the guide has one density"
                remedy = " Give the guide plate= or an encoder."
            else:
                cause = f" but not '{outside[0]}'"
                is_global = any(other.name == outside[0] for other in latent)
                remedy = (
                    " Use global_latents='elbo'." if is_global else " Put that site in the plate."
                )
            is_summed = bool(outside) and outside[0] in summed
            is_summed |= any(name not in each.plates for each in table.enumerated_in_guide)
            if is_summed or table.dependence.get(name, PlateDependence()).outside:
                remedy = ""  # that would be refused
            warn_user(
                f"Plate '{name}' encloses latent site '{local}'{cause}: all its {frame.size} "
                f"entries share one joint weight.{remedy}"
            )
            return
