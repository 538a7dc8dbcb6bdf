"""Log-densities of traces as ``[M, K, *plates]`` tensors.

The subsample scale of the shared plates is taken out of the log-weights, to be multiplied on after
the bound: inside a logarithm of a mean it would be a power of the weights. A user's own scales and
masks stay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_recursive.tracing.compatibility import (
    batch_shapes,
    check_batch_shape,
    check_finite,
    no_tensor,
)
from pyro_recursive.tracing.handlers import ComponentIndex
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.runs import ParticleRun
from pyro_recursive.tracing.sites import Site, is_delta, own_scale, sites


@dataclass(frozen=True)
class Densities:
    """Log-densities as ``[M, K, *plates]`` in nats; None for a group without sites.

    ``model`` is log p; ``density``, ``score`` and ``jacobian`` together are log q: of the
    reparameterised sites, of the other sampled ones, and of what is computed from them. Scales and
    masks are in these; ``density_rest`` and ``score_rest`` are what they took away from the density
    that the samples come from, None where they took nothing. ``names`` are the sites that were
    asked for, None for all.
    """

    layout: PlateLayout
    model: Tensor | None
    density: Tensor | None
    score: Tensor | None
    jacobian: Tensor | None
    density_rest: Tensor | None = None
    score_rest: Tensor | None = None
    names: frozenset[str] | None = None

    @cached_property
    def reparameterized(self) -> Tensor:
        """The log-weights but for the score-handled sites, with their graph."""
        total = torch.zeros(()) if self.model is None else self.model
        for group in (self.density, self.jacobian):
            if group is not None:
                total = total - group
        return total

    @cached_property
    def log_weights(self) -> Tensor:
        """``log p - log q``, without a graph."""
        total = self.reparameterized.detach()
        if self.score is not None:
            total = total - self.score.detach()
        particles = self.layout.particles
        shape = (particles.num_estimates, particles.num_particles, *self.layout.shape)
        return total.expand(shape)


def densities(
    runs: Sequence[ParticleRun], layout: PlateLayout, only: frozenset[str] | None = None
) -> Densities:
    """Return the log-densities of runs; `only` restricts them to sites of these names."""
    names = ("model", "density", "score", "jacobian", "density_rest", "score_rest")
    groups: dict[str, list[list[tuple[Site, Tensor]]]] = {
        name: [[] for _ in runs] for name in names
    }
    for number, run in enumerate(runs):
        for trace, group_of in ((run.model, lambda site: "model"), (run.guide, guide_group)):
            for site in sites(trace):
                if only is None or site["name"] in only:
                    for group, log_prob, rest in _parts(site, group_of(site), layout):
                        groups[group][number].append((site, log_prob))
                        if rest is not None:
                            groups[f"{group}_rest"][number].append((site, rest))
    tensors = {name: layout.gather(group) for name, group in groups.items()}
    return Densities(layout, **tensors, names=only)


def guide_group(site: Site) -> str:
    """Return which part of log q a guide site belongs to; see `Densities`."""
    if is_delta(site) or (site["is_observed"] and site["fn"].has_rsample):
        return "jacobian"
    return "density" if site["fn"].has_rsample else "score"


def _parts(
    site: Site, group: str, layout: PlateLayout
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield the groups that a site adds to: a log-density, and what weights took away from it."""
    is_weighted = group in ("density", "score") and _is_weighted(site, layout)
    if isinstance(site["fn"], ComponentIndex):
        # The mixture's density, without the choice, is what the components are drawn from.
        whole = site["fn"].log_choice(site["value"])
        own = weighted(whole, site, layout)
        for name, sign in (("score", 1), ("density", -1)):
            yield name, sign * own, sign * (whole - own) if is_weighted else None
        return
    log_prob = log_density(site, layout)
    yield group, log_prob, _whole_density(site) - log_prob if is_weighted else None


def log_density(site: Site, layout: PlateLayout) -> Tensor:
    """Return a site's log-density with mask and user's scale, without the shared plates' scale."""
    log_prob = weighted(log_prob_of(site, site["fn"]), site, layout)
    check_batch_shape(site, log_prob.shape)
    return log_prob


def weighted(log_prob: Tensor, site: Site, layout: PlateLayout) -> Tensor:
    """Return a log-density with the mask and the user's scale of a site."""
    return scale_and_mask(log_prob, own_scale(site, layout.names), site["mask"])


def _is_weighted(site: Site, layout: PlateLayout) -> bool:
    """Whether a scale or a mask changes the site's density."""
    masked = site["mask"] is not None or _unmasked(site["fn"]) is not site["fn"]
    scale = own_scale(site, layout.names)
    return masked or isinstance(scale, Tensor) or scale != 1


def _whole_density(site: Site) -> Tensor:
    """Return the log-density that a guide site is sampled from, whatever its scale and mask."""
    return log_prob_of(site, _unmasked(site["fn"]))


def _unmasked(fn: Any) -> Any:
    if isinstance(fn, dist.MaskedDistribution):
        return _unmasked(fn.base_dist)
    if isinstance(fn, dist.Independent):
        base = _unmasked(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    return fn


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
        return no_tensor(site)
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
