"""Guides of Gaussians with parameters of their own, and their symmetrised KL in closed form."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from pyro.distributions import Normal
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.mixture_distributions import ListMixture
from pyro_recursive.training.parameters import TrainedParameters
from pyro_recursive.training.stopping import Divergence, Values

AUTOGUIDES = AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal


def gaussians_of(guide: Any) -> list[Any] | None:
    """Return independent Gaussians, and mixtures of them, that make up a guide; of all rows.

    None for a guide that has others, an encoder for example; an empty list before its first call.
    """
    if isinstance(guide, LatentGuide):
        return guide.free_posteriors()
    if isinstance(guide, AutoGuideList):
        found = [gaussians_of(part) for part in guide]
        return None if None in found else [each for part in found for each in part or ()]
    if not isinstance(guide, (AutoNormal, *AUTOGUIDES)):
        return None
    if guide.prototype_trace is None:
        return []
    if isinstance(guide, AutoNormal):
        names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
        of_sites = [(attrgetter(n)(guide.locs), attrgetter(n)(guide.scales)) for n in names]
        return [Normal(loc.clone(), scale) for loc, scale in of_sites]
    if isinstance(guide, AutoDiagonalNormal):
        return [Normal(guide.loc.clone(), guide.scale)]
    return [guide.get_posterior()]


def symmetric_kl(one: Any, other: Any) -> Tensor:
    """Return ``KL(p || q) + KL(q || p)`` in nats, over all rows; of mixtures an upper bound.

    That of the weights, and by their means of each component's.
    """
    if not isinstance(one, ListMixture):
        return (kl_divergence(one, other) + kl_divergence(other, one)).sum()
    shape = *one.batch_shape, one.num_components
    p, q = one.log_weights.expand(shape), other.log_weights.expand(shape)
    total = ((p.exp() - q.exp()) * (p - q)).sum()
    for m, (a, b) in enumerate(zip(one.components, other.components, strict=True)):
        there, back = kl_divergence(a, b), kl_divergence(b, a)
        total = total + (p[..., m].exp() * there + q[..., m].exp() * back).sum()
    return total


def divergence_of(guide: Callable, parameters: TrainedParameters) -> Divergence | None:
    """Return the symmetrised KL between a guide at two sets of parameters.

    None where there is no closed form, or parameters are trained that are not the guide's.
    """
    of_guide = list(map(id, guide.parameters())) if gaussians_of(guide) is not None else []  # type: ignore[attr-defined]
    if not set(map(id, parameters.by_name.values())) <= set(of_guide):
        return None

    @torch.no_grad()
    def divergence(one: Values, other: Values) -> float:
        pairs = zip(at(one), at(other), strict=True)
        return float(sum(symmetric_kl(p, q) for p, q in pairs))

    def at(values: Values) -> Sequence[Any]:
        with parameters.holding(values):
            return gaussians_of(guide) or ()

    return divergence
