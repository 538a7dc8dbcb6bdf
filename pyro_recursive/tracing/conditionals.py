"""Enumerated latents given all other sites: draws of them, and densities with them summed out.

Sums and draws are of the model itself: masks count, scales of the user's and of subsamples do not.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.ops import packed
from torch import Tensor

from pyro_recursive.tracing.enumeration import (
    Component,
    Factor,
    StableRing,
    factorised,
    joint_site,
    packed_dims,
)
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.sites import Site, SiteRecord, SiteTable, entry_mask_of, is_delta


class _DrawingRing(StableRing):
    """Notes the product of all factors of each latent, in the order in which they are summed."""

    def __init__(self, dim_to_size: dict[str, int]) -> None:
        super().__init__(dim_to_size=dim_to_size)
        self.products: list[tuple[str, Tensor]] = []

    def log_sum(self, term: Tensor, dim: str) -> Tensor:
        self.products.append((dim, term))
        return super().log_sum(term, dim)


def draw_enumerated(
    table: SiteTable, layout: PlateLayout, undrawn: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """Draw the enumerated latents of a run of the model from their posterior given all other sites.

    Forward sums, backward draws: what was summed out last is drawn first, and each latent given
    those before, independently in each entry of its plates (of particles, too). Where all of its
    values are impossible it has the first. Sites in ``undrawn`` are data that are missing, and tell
    nothing.

    Returns:
        By site, values with dims of plates and of events, and none of enumeration.

    Raises:
        ValueError: latents depend on a subsampled plate that they are outside of.
    """
    ordinary, components = factorised(table, layout)
    single = [record for record in ordinary if "_enumerate_dim" in record.site["infer"]]
    values = {record.name: _support(record.site)[0] for record in single}
    for component in components:
        _check_whole(component, layout)
        ring, index = _DrawingRing(component.sizes), dict[str, Tensor]()
        component.contracted((f for f in component.factors if f.record.name not in undrawn), ring)
        for symbol, product in reversed(ring.products):
            record = component.enumerated[symbol]
            index[symbol] = _draw(product, symbol, index, _plates(record, component))
            unpacked = packed.unpack(index[symbol], component.trace.symbol_to_dim)
            values[record.name] = _support(record.site)[unpacked]
    return values


def _support(site: Site) -> Tensor:
    """Return the values of an enumerated latent, ``[C, *event]``: the same in all entries."""
    event_dim = site["fn"].event_dim
    support = site["value"].movedim(site["infer"]["_enumerate_dim"] - event_dim, 0)
    return support[(slice(None), *[0] * (support.dim() - 1 - event_dim))]


def _plates(record: SiteRecord, component: Component) -> dict[str, int]:
    """Return the sizes of a latent's plates by symbol, without those of one entry."""
    frames = [f for f in record.site["cond_indep_stack"] if f.vectorized and f.size > 1]
    return {component.trace.plate_to_symbol[frame.name]: frame.size for frame in frames}


def _draw(product: Tensor, symbol: str, index: dict[str, Tensor], plates: dict[str, int]) -> Tensor:
    """Draw indices of a latent's values, packed, given those of the latents drawn before."""
    for other in packed_dims(product):
        if other in index:
            product = packed.gather(product, index[other], other)
    dims = packed_dims(product)
    missing = sorted(plates.keys() - set(dims))  # a set's order differs between processes
    logits = product.expand(*(plates[plate] for plate in missing), *product.shape)
    dims = "".join(missing) + dims
    found = drawn_index(logits, dims.index(symbol))
    found._pyro_dims = dims.replace(symbol, "")  # type: ignore[attr-defined]
    return found


def drawn_index(logits: Tensor, dim: int) -> Tensor:
    """Draw an index along a dim by log-weights that need no norm; the first where none has any."""
    # The smallest of exponential variables with these rates.
    noise = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_()
    noise = noise.clamp_min(torch.finfo(logits.dtype).tiny)
    return (logits - noise.log()).argmax(dim)


def _check_whole(component: Component, layout: PlateLayout) -> None:
    """Raise where a part of the data is not enough to know a latent by."""
    shared = component.frames(layout)
    for factor in component.factors:
        for name, frame in factor.frames.items():
            if name not in shared and frame.full_size not in (None, frame.size):
                records = map(component.enumerated.__getitem__, sorted(component.symbols))
                outside = next((r for r in records if name not in r.plates), factor.record)
                raise ValueError(
                    f"Site '{outside.name}' is enumerated and depends on all of plate '{name}', "
                    f"of which there are {frame.size} of {frame.full_size} entries. Pass the full "
                    "data."
                )


@dataclass(frozen=True)
class Conditional:
    """Log-densities of sites that are summed together, without scales, at the plates of all.

    ``site`` has the frames of these plates, and is named after ``observed``, the sites with data.
    ``log_likelihood`` is log p(x | z), nan in entries where all data are masked and -inf where p(z)
    is 0, and ``log_prior`` log p(z) of ``latent``, the sites that are not enumerated; None without
    such sites.
    """

    site: Site
    observed: tuple[Site, ...]
    latent: tuple[str, ...]
    log_likelihood: Tensor | None
    log_prior: Tensor | None


def conditionals(
    table: SiteTable, layout: PlateLayout
) -> tuple[list[SiteRecord], list[Conditional]]:
    """Return a model's sites that depend on no enumerated latent, and the densities of the others.

    ``log p(x | z)`` is the log of a sum over the enumerated latents with the factors of the data
    minus the one without. It is at the plates that enclose all sites of the sum, as the latents may
    be shared by the entries of others.
    """
    ordinary, components = factorised(table, layout)
    return ordinary, [_conditional(component, layout) for component in components]


def _conditional(component: Component, layout: PlateLayout) -> Conditional:
    observed, others, latent = list[Factor](), list[Factor](), list[str]()
    for factor in component.factors:
        site = factor.record.site
        has_data = site["is_observed"] and not is_delta(site)  # not computed
        (observed if has_data else others).append(factor)
        if not site["is_observed"] and "_enumerate_dim" not in site["infer"]:
            latent.append(factor.record.name)
    frames, likelihood = component.frames(layout), None
    prior = _summed(component, others, frames)
    if observed:
        total = _summed(component, component.factors, frames)
        likelihood = torch.where(prior.isneginf(), -math.inf, total - prior)
        seen = _seen([f.record.site for f in observed], layout, frames)
        if seen is not None:
            likelihood = torch.where(seen, likelihood, torch.nan)
    return Conditional(
        joint_site(observed, frames),
        tuple(factor.record.site for factor in observed),
        tuple(latent),
        likelihood,
        prior if latent else None,
    )


def _summed(component: Component, factors: list[Factor], plates: Iterable[str]) -> Tensor:
    """Return the log of a sum of products of factors, with the dims of these plates."""
    ring, symbols = StableRing(dim_to_size=component.sizes), component.trace.plate_to_symbol
    kept = {symbols[name] for name in plates if name in symbols}  # those that are no loops
    found = component.contracted(factors, ring).items()
    terms = [ring.product(each, ordinal - kept) for ordinal, every in found for each in every]
    unpacked = [packed.unpack(term, component.trace.symbol_to_dim) for term in terms]
    return sum(unpacked[1:], unpacked[0])


def _seen(observed: list[Site], layout: PlateLayout, frames: dict[str, Any]) -> Tensor | None:
    """Return in which entries of plates some of the sites are not masked; None for all."""
    kept = [frame.dim for frame in frames.values() if frame.vectorized]
    total = None
    for site in observed:
        mask = entry_mask_of(site)
        if mask is None:
            return None
        others = [dim for dim in range(-mask.dim(), 0) if dim not in kept]
        mask = mask.any(others, keepdim=True) if others else mask
        mask = mask.reshape(mask.shape[max(0, mask.dim() - layout.max_plate_nesting - 1) :])
        total = mask if total is None else total | mask
    return total
