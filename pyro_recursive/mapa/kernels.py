"""Kernels for each likelihood, and the choice among them.

Most are posterior predictive densities of x_n after the single observation x_i, under a weak
conjugate prior on the likelihood's parameters (Jeffreys' by default). The data of a row are
flattened, and independent given the parameters.
"""

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch import distributions as td

from pyro_recursive.mapa.kernel_base import (
    Distance,
    Features,
    Gaussian,
    InnerProductKernel,
    Kernel,
    LogKernel,
    StudentT,
    check_data,
    check_positive,
    flat,
    sum_of_pairs,
)
from pyro_recursive.tracing.compatibility import check_finite
from pyro_recursive.tracing.sites import plates_of, sites

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
_NEWTON_STEPS = 8  # six are enough in float64
_SERIES = 1e-2  # below this, differences would lose more digits than the series' next term has
_WRAPPERS = (td.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)


@dataclass(frozen=True, repr=False)
class Bernoulli(InnerProductKernel):
    """The kernel of binary data: each bit of x_i, softened, is the mean of that of x_n.

    ``log k = sum_d log Bernoulli(x_nd; a + (1 - 2 a) x_id)`` is the posterior predictive under a
    prior Beta(c, c), with ``a = c / (2 c + 1)``: 1/3 for a flat prior, 1/4 for Jeffreys' c = 1/2,
    the default. For sharp decoders a smaller ``a`` is nearer to their posterior. Grey values in
    [0, 1] are means of random bits; for those of x_n log k is the mean over the bits, no density.

    ``concentration`` is c; ``softening`` is a, below 1/2, instead of c.

    Source: `Towards Model-Agnostic Posterior Approximation` (Yacoby et al., arXiv 2403.08941),
    which softens bits; the prior is ours.

    >>> x = torch.tensor([[0, 0], [0, 1]])
    >>> Bernoulli()(x, x).exp()
    tensor([[0.5625, 0.1875],
            [0.1875, 0.5625]], dtype=torch.float64)
    """

    concentration: float | None = None
    softening: float | None = None

    support = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_positive(self, concentration=self.concentration, softening=self.softening)
        if self.concentration is not None and self.softening is not None:
            raise ValueError(f"Give concentration or softening, not both: {self!r}.")
        if not self.a < 0.5:
            raise ValueError(f"softening must be below 1/2, got {self.softening}.")

    @property
    def a(self) -> float:
        """The probability that a bit is not that of x_i."""
        if self.softening is not None:
            return self.softening
        c = 0.5 if self.concentration is None else self.concentration
        return c / (2 * c + 1)

    def reference_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return logits of the softened bits, and the log-probability of zeros."""
        means = self.a + (1 - 2 * self.a) * flat(data)
        log_zero = (-means).log1p()
        return Features(means.log() - log_zero, log_zero.sum(-1))


@dataclass(frozen=True, repr=False)
class ContinuousBernoulli(InnerProductKernel):
    """The kernel of intensities in [0, 1]: a continuous Bernoulli with mean x_i.

    The density at the most likely parameter after x_i, as there is no closed predictive density.
    Means are clamped to [margin, 1 - margin], where the density is no spike.

    Source: `The continuous Bernoulli: fixing a pervasive error in variational autoencoders`
    (Loaiza-Ganem & Cunningham, arXiv 1907.06845).

    >>> x = torch.tensor([[0.0], [0.5]])
    >>> ContinuousBernoulli(margin=0.1)(x, x).exp()
    tensor([[9.9959, 1.0000],
            [0.0675, 1.0000]], dtype=torch.float64)
    """

    margin: float = 0.1

    support = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the margin."""
        if not 0 < self.margin < 0.5:
            raise ValueError(f"margin must be between 0 and 1/2, got {self.margin}.")

    def reference_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return the logits with these means, and the logarithms of the density at zero."""
        logits = _logits_of_mean(flat(data).clamp(self.margin, 1 - self.margin))
        return Features(logits, -_log_normaliser(logits).sum(-1))


@dataclass(frozen=True, repr=False)
class Categorical(Kernel):
    """The kernel of categories: x_i, softened, is the distribution of x_n.

    ``log k = sum_d log((1[x_nd = x_id] + c) / (1 + C c))``: the posterior predictive under a
    symmetric Dirichlet prior with concentration c. Data ``[R, *x]`` are categories 0 to C - 1; with
    ``one_hot`` they are ``[R, *x, C]`` with a single 1 in each vector of C.

    >>> x = torch.tensor([[0, 1], [2, 1]])
    >>> Categorical(3, concentration=1.0)(x, x).exp()
    tensor([[0.2500, 0.1250],
            [0.1250, 0.2500]], dtype=torch.float64)
    """

    num_categories: int
    concentration: float = 0.5
    one_hot: bool = False

    def __post_init__(self) -> None:
        """Check the concentration."""
        check_positive(self, concentration=self.concentration)

    def check(self, data: Tensor) -> None:
        """Raise ValueError for data that are no categories."""
        most = 1 if self.one_hot else self.num_categories - 1
        check_data(self, data, 0, most, whole=True)
        size = data.shape[-1] if self.one_hot else self.num_categories
        if size != self.num_categories or (self.one_hot and (data.sum(-1) != 1).any()):
            raise ValueError(f"{self!r} needs data [R, *x, C] with one 1 in each vector of C.")

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k, ``[Q, R]``, float64."""
        c, left, right = self.concentration, self._categories(query), self._categories(reference)
        none = left.shape[1] * math.log(c / (1 + self.num_categories * c))
        return sum_of_pairs(torch.eq, left, right) * math.log1p(1 / c) + none

    def _categories(self, data: Tensor) -> Tensor:
        categories = data.to(torch.uint8).argmax(-1) if self.one_hot else data.long()
        return categories.reshape(len(data), -1)


class _GammaConjugate(Kernel):
    """A kernel of data whose likelihood's parameters have a prior Gamma(shape, rate)."""

    shape: float
    rate: float

    def __post_init__(self) -> None:
        """Check the prior, which is improper for a shape or rate of zero."""
        check_positive(self, zero=True, shape=self.shape, rate=self.rate)


@dataclass(frozen=True, repr=False)
class Poisson(_GammaConjugate):
    """The kernel of counts: a negative binomial around each count of x_i.

    The posterior predictive under a prior Gamma(shape, rate) on the means, by default Jeffreys':
    ``log k = sum_d log NegativeBinomial(x_nd; shape + x_id, odds of 1 to rate + 1)``.

    >>> x = torch.tensor([[0.0], [9.0]])
    >>> Poisson()(x, x).exp().round(decimals=4)
    tensor([[7.0710e-01, 1.4000e-03],
            [3.0000e-04, 9.3400e-02]], dtype=torch.float64)
    """

    shape: float = 0.5
    rate: float = 0.0

    support = (0.0, math.inf)
    whole = True

    def __post_init__(self) -> None:
        """Check the prior, whose posterior is improper for a shape of zero and a count of zero."""
        super().__post_init__()
        check_positive(self, shape=self.shape)

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k, ``[Q, R]``, float64."""
        x, shape = flat(query), flat(reference) + self.shape
        log_odds = math.log(self.rate + 2)
        left = -(x + 1).lgamma() - x * log_odds
        right = shape * (math.log(self.rate + 1) - log_odds) - shape.lgamma()
        total = left.sum(-1)[:, None] + right.sum(-1)
        return total + sum_of_pairs(lambda x, y: (x + y).lgamma(), x, shape)


@dataclass(frozen=True, repr=False)
class Gamma(_GammaConjugate):
    """The kernel of positive data whose likelihood is a gamma of a known concentration m.

    The posterior predictive under a prior Gamma(shape, rate) on the likelihood's rates, by default
    Jeffreys', is a compound gamma: ``k = prod_d x_nd ** (m - 1) (rate + x_id) ** (shape + m) /
    (rate + x_id + x_nd) ** (shape + 2 m) / B(m, shape + m)``.

    >>> x = torch.tensor([[1.0], [10.0]])
    >>> Gamma(3.0)(x, x).exp().round(decimals=4)
    tensor([[0.4688, 0.0169],
            [0.0017, 0.0469]], dtype=torch.float64)
    """

    concentration: float
    shape: float = 0.0
    rate: float = 0.0

    support = (0.0, math.inf)

    def __post_init__(self) -> None:
        """Check the likelihood's concentration and the prior."""
        super().__post_init__()
        check_positive(self, concentration=self.concentration)

    def check(self, data: Tensor) -> None:
        """Raise ValueError for data that are not positive."""
        super().check(data)
        zero = self.rate > 0 and self.concentration == 1
        if not zero and (data == 0).any():
            raise ValueError(f"{self!r} needs data above 0.")

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k, ``[Q, R]``, float64."""
        m, known = self.concentration, self.shape + self.concentration
        x, rate = flat(query), flat(reference) + self.rate
        log_beta = math.lgamma(m) + math.lgamma(known) - math.lgamma(m + known)
        left = torch.xlogy(torch.full_like(x, m - 1), x) - log_beta
        total = left.sum(-1)[:, None] + known * rate.log().sum(-1)
        return total - (known + m) * sum_of_pairs(lambda x, y: (x + y).log(), x, rate)


def Exponential(shape: float = 0.0, rate: float = 0.0) -> Gamma:
    """Return the kernel of data whose likelihood is exponential: a `Gamma` of concentration 1."""
    return Gamma(1.0, shape, rate)


def kernel_for(
    fn: td.Distribution, value: Tensor, number: int | None = None, k: int | None = None
) -> Kernel:
    """Return the kernel for data with a given likelihood.

    A Normal with a known scale (the same for all rows, without gradient) has `Gaussian(scale)`;
    with a learned scale, or one that differs between rows, bandwidths have perplexity 30, or a
    third of the number of rows if that is less. The others have the kernels of their names.
    ``number`` is that of all data, where ``value`` ``[N, *x]`` are some; ``k`` that of neighbours
    kept, which bounds perplexities.

    Raises:
        ValueError: for other distributions.

    >>> kernel_for(dist.Normal(torch.zeros(20, 3), 0.5).to_event(1), torch.zeros(20, 3))
    Gaussian(scale=0.5)
    """
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    match fn:
        case td.Bernoulli():
            return Bernoulli()
        case td.ContinuousBernoulli():
            return ContinuousBernoulli()
        case td.Poisson():
            return Poisson()
        case td.Exponential():
            return Exponential()
        case td.Normal():
            return _gaussian(fn.scale, value, number or len(value), k)
        case td.Categorical():
            return Categorical(fn.probs.shape[-1])
        case td.OneHotCategorical():
            return Categorical(fn.event_shape[-1], one_hot=True)
        case td.Gamma():
            return _gamma(fn.concentration)
    raise ValueError(f"No kernel is known for {type(fn).__name__}: give kernel= or table=.")


def kernel_of_model(trace: poutine.Trace, site: str, raw: Any, number: int, k: int) -> Kernel:
    """Return the kernel of the one observed site of a model's trace, if it observes the inputs."""
    observed = [each for each in sites(trace) if each["is_observed"]]
    if len(observed) != 1:
        raise ValueError("The model must observe one site: give kernel= or table=.")
    (seen,) = observed
    check_finite(seen)
    (frame,) = plates_of(trace.nodes[site]).values()
    value = seen["value"].detach()
    rows = raw
    if isinstance(raw, Tensor) and frame.name in trace.nodes and len(raw) != frame.size:
        rows = raw[trace.nodes[frame.name]["value"].to(raw.device)]
    if raw is not None and not (isinstance(rows, Tensor) and same_numbers(rows, value)):
        raise ValueError(f"Site '{seen['name']}' does not observe the inputs: give kernel=.")
    return kernel_for(seen["fn"], value, number, k)


def same_numbers(rows: Tensor, value: Tensor) -> bool:
    """Whether two tensors have the same numbers, whatever their shapes."""
    same_size = len(rows) and rows.numel() == value.numel()
    return bool(same_size and (rows.to(value).flatten() == value.flatten()).all())


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
        raise ValueError("The Gamma's concentration is learned or differs: give kernel=Gamma(...).")
    return Gamma(float(first))


def _logits_of_mean(mean: Tensor) -> Tensor:
    """Return the logits of continuous Bernoullis with means in (0, 1), by Newton's method.

    The mean is concave in positive logits and starts below the root: no step passes the root.
    """
    logits = 1 / (1 - mean) - 1 / mean
    for _ in range(_NEWTON_STEPS):
        near = logits.abs() < _SERIES
        safe = logits.masked_fill(near, 1)
        value = torch.where(near, 0.5 + logits / 12, 1 / -(-safe).expm1() - 1 / safe)
        slope = 1 / safe.square() - 0.25 / (0.5 * safe).sinh().square()
        logits = logits - (value - mean) / torch.where(near, 1 / 12, slope)
    return logits


def _log_normaliser(logits: Tensor) -> Tensor:
    """Return ``log((exp(t) - 1) / t)``: t / 2 and an even function of t."""
    t = logits.abs()
    safe = t.masked_fill(t < _SERIES, 1)
    away = 0.5 * safe + (-(-safe).expm1()).log() - safe.log()
    even = torch.where(t < _SERIES, t.square() / 24, away)
    return 0.5 * logits + even
