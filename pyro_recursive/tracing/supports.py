"""Supports of sites and the coordinates of their values: real, circular, fixed or not.

Angles have densities with a period of 2 pi, normalised over one period, while torch declares their
support to be the real line. A density over the line would count each angle many times.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Distribution,
    IndependentTransform,
    Transform,
    TransformedDistribution,
    constraints,
)

from pyro_recursive.tracing.sites import layers, tensors_of, unmasked
from pyro_recursive.tracing.transforms import PERIOD, CircleTransform, bijection

OFFSETS = (0.0, 1.0, 2.5)  # radians, at which densities are compared
CONSTANTS = [c for c in vars(dist.constraints).values() if isinstance(c, constraints.Constraint)]
_circular: dict[Any, bool] = {}  # by the types that a distribution is made of


def plain_support(support: Any) -> Any:
    """Return a support that has a transform: a mixture's is that of its components."""
    if isinstance(support, constraints.independent):
        base = plain_support(support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    if isinstance(support, constraints.MixtureSameFamilyConstraint):
        return plain_support(support.base_constraint)
    return support


def bare_support(support: Any) -> Any:
    """Return a support without event dims."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return constraints.real if support is constraints.real_vector else support


def is_interior(support: Any, value: Tensor) -> bool:
    """Whether values are strictly between the bounds of a support, if it has any."""
    bare = bare_support(plain_support(support))
    lower = 0.0 if bare is constraints.simplex else getattr(bare, "lower_bound", -math.inf)
    return bool(((value > lower) & (value < getattr(bare, "upper_bound", math.inf))).all())


def has_moving_bounds(fn: Any) -> bool:
    """Whether a bound of a support has a gradient; it may then move, and the density jump there."""
    return any(isinstance(end, Tensor) and end.requires_grad for end in _bounds(layers(fn)[-1]))


def _bounds(fn: Any) -> tuple[Any, Any]:
    """Return the bounds of a support, None for none; constants may be others behind transforms."""
    if isinstance(fn, TransformedDistribution) and _has_support_of_torch(fn):
        low, high = _bounds(layers(fn.base_dist)[-1])
        for transform in _parts(fn.transforms):
            low = _moved(low, transform, "lower_bound")
            high = _moved(high, transform, "upper_bound")
        return low, high
    try:
        support = bare_support(plain_support(fn.support))
    except NotImplementedError:  # a distribution that does not say
        return None, None
    return getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)


def _has_support_of_torch(fn: TransformedDistribution) -> bool:
    """Whether a support is the codomain of the last transform: the reals for an affine one."""
    return type(fn).support is TransformedDistribution.support


def _parts(transforms: Iterable[Any]) -> Iterator[Any]:
    for each in transforms:
        if isinstance(each, ComposeTransform):
            yield from _parts(each.parts)
        elif isinstance(each, IndependentTransform):
            yield from _parts([each.base_transform])
        else:
            yield each


def _moved(bound: Any, transform: Any, name: str) -> Any:
    """Return what becomes of a bound: one of the domain becomes that of the codomain, if any."""
    if bound is None or (isinstance(bound, Tensor) and bound.requires_grad):
        return bound
    if isinstance(transform, AffineTransform):
        is_zero = not isinstance(bound, Tensor) and bound == 0
        return transform.loc if is_zero else transform.loc + transform.scale * bound
    if hasattr(bare_support(transform.domain), name):
        return getattr(bare_support(transform.codomain), name, None)
    return 1.0


def is_fixed(fn: Any, is_angle: bool) -> bool:
    """Whether a distribution has the same support in all calls: it has no bounds of its own."""
    if is_angle:
        return _transformed(fn) is None
    bare = bare_support(plain_support(fn.support))
    return any(bare is constant for constant in CONSTANTS)


def coordinates(fn: Any, is_angle: bool) -> Transform:
    """Return the bijection from unconstrained values to those of a distribution.

    Raises:
        NotImplementedError: there is none for the support.
    """
    if not is_angle:
        return bijection(plain_support(fn.support))
    transformed, circle = _transformed(fn), CircleTransform()
    return ComposeTransform([circle, *transformed.transforms]) if transformed else circle


def is_circular(fn: Any) -> bool:
    """Whether a distribution is one of angles, or of a function of angles.

    The density of angles over the real line has the period 2 pi. The answer for a type is
    kept once its densities are finite.
    """
    base = layers(fn)[-1]
    if type(base) is dist.Normal:  # in each step, for most sites
        return False
    if isinstance(base, TransformedDistribution):
        return is_circular(base.base_dist)
    try:
        support = bare_support(plain_support(fn.support))
    except NotImplementedError:  # a distribution that does not say
        return False
    if support is not constraints.real:
        return False
    kind = _types(fn)
    if kind not in _circular:
        found = _has_period(unmasked(fn))
        if found is None:
            return False
        _circular[kind] = found
    return _circular[kind]


def _transformed(fn: Any) -> TransformedDistribution | None:
    """Return a transformed distribution without masks and event dims, None for another one."""
    base = layers(fn)[-1]
    return base if isinstance(base, TransformedDistribution) else None


def _types(fn: Any) -> tuple[Any, ...]:
    parts = [part for part in vars(fn).values() if isinstance(part, Distribution)]
    return type(fn), *map(_types, parts)


@torch.no_grad()
def _has_period(fn: Any) -> bool | None:
    """Compare densities a few periods apart; None if they cannot be compared at these parameters.

    Each coordinate is moved by a number of periods of its own. A density that is constant is that
    of the uniform distribution on the circle, or of a wide or improper one on the line.
    """
    like, event = next(tensors_of(fn), torch.empty(())), torch.Size(fn.event_shape)
    origin = like.new_zeros((*fn.batch_shape, *event), dtype=torch.float64)
    periods = 1 + torch.arange(event.numel(), device=origin.device).remainder(3)
    shift = PERIOD * periods.reshape(event)
    try:
        here = torch.stack([fn.log_prob(origin + offset) for offset in OFFSETS])
        there = torch.stack([fn.log_prob(origin + offset + shift) for offset in OFFSETS])
    except Exception:  # no density at such values
        return False
    if not bool((here.isfinite() & there.isfinite()).all()):
        return None
    variation, change = (here - here[0]).abs().max(), (there - here).abs().max()
    if variation > 0:
        return bool(change < 1e-3 * variation)
    uniform = -math.log(PERIOD) * event.numel()
    return bool((here / uniform - 1).abs().max() < 1e-5)
