"""Kernels: how near data are to each other, for each likelihood, and the choice among them."""

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from pyro_recursive.mapa.distances import Distance, Gaussian, StudentT
from pyro_recursive.mapa.kernel import Features, InnerProductKernel, Kernel, LogKernel
from pyro_recursive.mapa.predictive import Bernoulli, Categorical, ContinuousBernoulli
from pyro_recursive.mapa.waiting import Exponential, Gamma, Poisson

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "Distance",
    "Exponential",
    "Features",
    "Gamma",
    "Gaussian",
    "InnerProductKernel",
    "Kernel",
    "LogKernel",
    "Poisson",
    "StudentT",
    "kernel_for",
]

_PERPLEXITY = 30.0
_WRAPPERS = (td.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)


def kernel_for(
    fn: td.Distribution, value: Tensor, number: int | None = None, k: int | None = None
) -> Kernel:
    """Return the kernel for data with a given likelihood.

    A Normal with a known scale (the same for all rows, without gradient) has `Gaussian(scale)`;
    where the scale is learned or differs between rows, bandwidths have perplexity 30, or a third
    of the rows where these are few. Bernoulli, ContinuousBernoulli, Poisson, Categorical,
    OneHotCategorical, Exponential and Gamma have the kernels of these names. A gamma's
    concentration must be one constant, as a Normal's scale.

    Arguments:
        fn: the distribution of an observed site; `Independent`, `MaskedDistribution` and
            `ExpandedDistribution` are looked through.
        value: the data ``[N, *x]``, or some of them.
        number: N, where these are not all.
        k: how many neighbours a table will keep, which bounds perplexities.

    Raises ValueError for other distributions, and names the remedy.

    >>> import pyro.distributions as dist
    >>> kernel_for(dist.Normal(torch.zeros(20, 3), 0.5).to_event(1), torch.zeros(20, 3))
    Gaussian(scale=0.5)
    >>> kernel_for(dist.Bernoulli(torch.full((20, 3), 0.5)).to_event(1), torch.zeros(20, 3))
    Bernoulli()
    """
    base = _unwrapped(fn)
    plain: dict[type[td.Distribution], Kernel] = {
        td.Bernoulli: Bernoulli(),
        td.ContinuousBernoulli: ContinuousBernoulli(),
        td.Poisson: Poisson(),
        td.Exponential: Exponential(),
    }
    for kind, kernel in plain.items():
        if isinstance(base, kind):
            return kernel
    if isinstance(base, td.Normal):
        return _gaussian(base.scale, value, number or len(value), k)
    if isinstance(base, td.Categorical):
        return Categorical(base.probs.shape[-1])
    if isinstance(base, td.OneHotCategorical):
        return Categorical(base.event_shape[-1], one_hot=True)
    if isinstance(base, td.Gamma):
        return _gamma(base.concentration)
    raise ValueError(
        f"no kernel is known for a {type(base).__name__} likelihood: give one as kernel= (any "
        "function (query [Q, *x], reference [R, *x]) -> [Q, R] of log weights, such as "
        "Gaussian(perplexity=30) or Distance(...)), or a Table of neighbours"
    )


def _unwrapped(fn: td.Distribution) -> td.Distribution:
    """Return the distribution inside `Independent`, masks and expansions, which have a base."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def _gaussian(scale: Tensor, value: Tensor, number: int, k: int | None) -> Gaussian:
    known = not scale.requires_grad
    scale = scale.detach().to(torch.float64)
    if known and (scale == scale.flatten()[0]).all():
        return Gaussian(float(scale.flatten()[0]))
    if known and scale.shape == value.shape and (scale == scale[:1]).all():
        return Gaussian(tuple(scale[0].flatten().tolist()))
    most = number if k is None else min(k, number)
    if most == 1:
        return Gaussian(1.0)  # whatever the scale, the one neighbour has all of q
    enough = min(_PERPLEXITY, number / 3, most / 2 if k is not None else _PERPLEXITY)
    return Gaussian(perplexity=max(enough, min(1.5, (1 + most) / 2)))


def _gamma(concentration: Tensor) -> Gamma:
    first = concentration.detach().flatten()[0]
    if concentration.requires_grad or (concentration != first).any():
        raise ValueError(
            "the kernel of a Gamma likelihood needs one constant concentration, and this one is "
            "learned or differs between data: give Gamma(concentration) as kernel=, at about its "
            "size"
        )
    return Gamma(float(first))
