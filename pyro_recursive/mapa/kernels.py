"""Kernels for each likelihood, and the choice among them.

Most are posterior predictive densities of x_n after the single observation x_i, under a weak
conjugate prior on the likelihood's parameters (Jeffreys' by default). The data of a row are
flattened, and independent given the parameters.
"""

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from pyro_recursive.mapa.distance_kernels import Distance, Gaussian, StudentT
from pyro_recursive.mapa.kernel_base import (
    Features,
    InnerProductKernel,
    Kernel,
    LogKernel,
    ScoreKernel,
    check_data,
    check_positive,
    flat,
    parts_of_pairs,
)

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


class _Intensities(InnerProductKernel):
    """A kernel of data in [0, 1] whose query features are the data."""

    def check(self, data: Tensor) -> None:
        """Raise ValueError for data outside [0, 1]."""
        check_data(self, data, least=0, most=1)

    def query_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return the data."""
        rows = flat(data)
        return Features(rows, rows.new_zeros(len(rows)))


@dataclass(frozen=True, repr=False)
class Bernoulli(_Intensities):
    """The kernel of binary data: each bit of x_i, softened, is the mean of that of x_n.

    ``log k = sum_d log Bernoulli(x_nd; a + (1 - 2 a) x_id)``, which is ``H log(a / (1 - a))`` and a
    constant, where H is the number of bits that differ. It is the posterior predictive under a
    prior Beta(c, c), with ``a = c / (2 c + 1)``: 1/3 for a flat prior, 1/4 for Jeffreys' c = 1/2,
    the default. For sharp decoders a smaller ``a`` is nearer to their posterior.

    Grey values in [0, 1] are means of random bits: of x_i they set the mean
    ``a + (1 - 2 a) x_i``; for those of x_n log k is the mean over the bits, a cross entropy and no
    density.

    Args:
        concentration: c.
        softening: a, below 1/2, instead of c.

    Raises:
        ValueError: both are given or out of range; data are outside [0, 1].

    Source: `Towards Model-Agnostic Posterior Approximation for Fast and Accurate Variational
    Autoencoders` (Yacoby et al., arXiv 2403.08941), which softens bits; the prior is ours.

    >>> x = torch.tensor([[0, 0], [0, 1]])
    >>> Bernoulli()(x, x).exp()
    tensor([[0.5625, 0.1875],
            [0.1875, 0.5625]], dtype=torch.float64)
    """

    concentration: float | None = None
    softening: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_positive(self, concentration=self.concentration, softening=self.softening)
        if self.concentration is not None and self.softening is not None:
            raise ValueError(f"give concentration or softening, not both: {self!r}")
        if self.softening is not None and not self.softening < 0.5:
            raise ValueError(f"softening must be below 1/2, got {self.softening}")

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
class ContinuousBernoulli(_Intensities):
    """The kernel of intensities in [0, 1]: a continuous Bernoulli with mean x_i.

    The density at the most likely parameter after x_i: that with mean x_i, not with ``probs`` x_i.
    Means are clamped to [margin, 1 - margin], where the density is no spike. There is no closed
    predictive density.

    Raises:
        ValueError: not ``0 < margin < 1/2``; data are outside [0, 1].

    Source: `The continuous Bernoulli: fixing a pervasive error in variational autoencoders`
    (Loaiza-Ganem & Cunningham, arXiv 1907.06845).

    >>> x = torch.tensor([[0.0], [0.5]])
    >>> ContinuousBernoulli(margin=0.1)(x, x).exp()
    tensor([[9.9959, 1.0000],
            [0.0675, 1.0000]], dtype=torch.float64)
    """

    margin: float = 0.1

    def __post_init__(self) -> None:
        """Check the margin."""
        if not 0 < self.margin < 0.5:
            raise ValueError(f"margin must be between 0 and 1/2, got {self.margin}")

    def reference_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return the logits with these means, and the logarithms of the density at zero."""
        logits = _logits_of_mean(flat(data).clamp(self.margin, 1 - self.margin))
        return Features(logits, -_log_normaliser(logits).sum(-1))


@dataclass(frozen=True, repr=False)
class Categorical(InnerProductKernel):
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
        """Check the numbers."""
        check_positive(self, concentration=self.concentration)
        if self.num_categories < 1:
            raise ValueError(f"num_categories must be 1 or more, got {self.num_categories}")

    def check(self, data: Tensor) -> None:
        """Raise ValueError for data that are no categories."""
        if not self.one_hot:
            check_data(self, data, least=0, most=self.num_categories - 1, whole=True)
            return
        check_data(self, data, least=0, most=1, whole=True)
        if data.dim() < 2 or data.shape[-1] != self.num_categories:
            raise ValueError(f"{self!r} needs data [R, *x, C], got shape {list(data.shape)}")
        if (data.sum(-1) != 1).any():
            raise ValueError(f"{self!r} needs exactly one 1 in each vector of categories")

    def width(self, data: Tensor) -> int:
        """Return the number of dimensions times that of categories."""
        return math.prod(data.shape[1:]) * (1 if self.one_hot else self.num_categories)

    def query_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return the categories as one-hot vectors."""
        rows = torch.nn.functional.one_hot(self._categories(data), self.num_categories)
        return Features(flat(rows), flat(rows).new_zeros(len(rows)))

    def reference_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return one-hot vectors times the score of a match, and the score of no match at all."""
        rows, zeros = self.query_features(data, origin)
        match, none = self._terms()
        return Features(rows * match, zeros + self._categories(data).shape[1] * none)

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k by comparing, ``[Q, R]``, float64: one-hot vectors may be very long."""
        match, none = self._terms()
        left, right = self._categories(query), self._categories(reference)
        matches = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
        for part in parts_of_pairs(left, right):
            matches += (left[:, None, part] == right[:, part]).sum(-1)
        return matches * match + left.shape[1] * none

    def _terms(self) -> tuple[float, float]:
        """Return the score of a match, and the log-probability of another category."""
        c = self.concentration
        return math.log1p(1 / c), math.log(c / (1 + self.num_categories * c))

    def _categories(self, data: Tensor) -> Tensor:
        categories = data.to(torch.uint8).argmax(-1) if self.one_hot else data.long()
        return categories.reshape(len(data), -1)


@dataclass(frozen=True, repr=False)
class Poisson(ScoreKernel):
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

    def __post_init__(self) -> None:
        """Check the prior."""
        check_positive(self, shape=self.shape)
        check_positive(self, zero=True, rate=self.rate)

    def check(self, data: Tensor) -> None:
        """Raise ValueError for data that are no counts."""
        check_data(self, data, least=0, whole=True)

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k, ``[Q, R]``, float64."""
        x, shape = flat(query), flat(reference) + self.shape
        log_odds = math.log(self.rate + 2)
        left = -(x + 1).lgamma() - x * log_odds
        right = shape * (math.log(self.rate + 1) - log_odds) - shape.lgamma()
        total = left.sum(-1)[:, None] + right.sum(-1)
        for part in parts_of_pairs(x, shape):
            total += (x[:, None, part] + shape[:, part]).lgamma().sum(-1)
        return total


@dataclass(frozen=True, repr=False)
class Gamma(ScoreKernel):
    """The kernel of positive data whose likelihood is a gamma of a known concentration m.

    The posterior predictive under a prior Gamma(shape, rate) on the likelihood's rates, a compound
    gamma: ``k = prod_d x_nd ** (m - 1) (rate + x_id) ** (shape + m) / (rate + x_id + x_nd) **
    (shape + 2 m)`` over ``B(m, shape + m)``. Under Jeffreys' prior, the default, only ratios of
    data matter. Zeros are allowed where rate > 0 and the concentration is 1.

    >>> x = torch.tensor([[1.0], [10.0]])
    >>> Gamma(3.0)(x, x).exp().round(decimals=4)
    tensor([[0.4688, 0.0169],
            [0.0017, 0.0469]], dtype=torch.float64)
    """

    concentration: float
    shape: float = 0.0
    rate: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_positive(self, concentration=self.concentration)
        check_positive(self, zero=True, rate=self.rate, shape=self.shape)

    def check(self, data: Tensor) -> None:
        """Raise ValueError for data that are not positive."""
        zero = self.rate > 0 and self.concentration == 1
        check_data(self, data, least=0, above=not zero)

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k, ``[Q, R]``, float64."""
        m, known = self.concentration, self.shape + self.concentration
        x, rate = flat(query), flat(reference) + self.rate
        log_beta = math.lgamma(m) + math.lgamma(known) - math.lgamma(m + known)
        left = torch.xlogy(torch.full_like(x, m - 1), x) - log_beta
        total = left.sum(-1)[:, None] + known * rate.log().sum(-1)
        for part in parts_of_pairs(x, rate):
            total -= (known + m) * (x[:, None, part] + rate[:, part]).log().sum(-1)
        return total


def Exponential(shape: float = 0.0, rate: float = 0.0) -> Gamma:
    """Return the kernel of data whose likelihood is exponential: a `Gamma` of concentration 1.

    ``k = prod_d (shape + 1) (rate + x_id) ** (shape + 1) / (rate + x_id + x_nd) ** (shape + 2)``.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> Exponential()(x, x).exp().round(decimals=4)
    tensor([[0.2500, 0.1875],
            [0.0625, 0.0833]], dtype=torch.float64)
    """
    return Gamma(1.0, shape, rate)


def kernel_for(
    fn: td.Distribution, value: Tensor, number: int | None = None, k: int | None = None
) -> Kernel:
    """Return the kernel for data with a given likelihood.

    A Normal with a known scale (the same for all rows, without gradient) has `Gaussian(scale)`;
    with a learned scale, or one that differs between rows, bandwidths have perplexity 30, or a
    third of the number of rows if that is less. Bernoulli, ContinuousBernoulli, Poisson,
    Categorical, OneHotCategorical, Exponential and Gamma (of one constant concentration) have the
    kernels of these names.

    Args:
        fn: the distribution of an observed site; `Independent`, `MaskedDistribution` and
            `ExpandedDistribution` are unwrapped.
        value: the data ``[N, *x]``, or some of them.
        number: N, where these are not all.
        k: how many neighbours a table will keep, which bounds perplexities.

    Raises:
        ValueError: for other distributions.

    >>> import pyro.distributions as dist
    >>> kernel_for(dist.Normal(torch.zeros(20, 3), 0.5).to_event(1), torch.zeros(20, 3))
    Gaussian(scale=0.5)
    >>> kernel_for(dist.Bernoulli(torch.full((20, 3), 0.5)).to_event(1), torch.zeros(20, 3))
    Bernoulli()
    """
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    plain: dict[type[td.Distribution], Kernel] = {
        td.Bernoulli: Bernoulli(),
        td.ContinuousBernoulli: ContinuousBernoulli(),
        td.Poisson: Poisson(),
        td.Exponential: Exponential(),
    }
    for kind, kernel in plain.items():
        if isinstance(fn, kind):
            return kernel
    if isinstance(fn, td.Normal):
        return _gaussian(fn.scale, value, number or len(value), k)
    if isinstance(fn, td.Categorical):
        return Categorical(fn.probs.shape[-1])
    if isinstance(fn, td.OneHotCategorical):
        return Categorical(fn.event_shape[-1], one_hot=True)
    if isinstance(fn, td.Gamma):
        return _gamma(fn.concentration)
    raise ValueError(
        f"no kernel is known for a {type(fn).__name__} likelihood: give one as kernel=, such as "
        "Gaussian(perplexity=30), or a Table of neighbours"
    )


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
            "a Gamma likelihood needs one constant concentration, and this one is learned or "
            "differs between data: give kernel=Gamma(concentration)"
        )
    return Gamma(float(first))


def _logits_of_mean(mean: Tensor) -> Tensor:
    """Return the logits of continuous Bernoullis with given means in (0, 1), by Newton's method.

    For positive logits the mean is increasing and concave, and the start lies between zero and the
    root, so that no step passes the root.
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
    """Return ``log((exp(t) - 1) / t)``, the logarithm of the integral of ``exp(t x)`` over [0, 1].

    An even function of t beside t / 2: ``t / 2 + log(sinh(t / 2) / (t / 2))``.
    """
    t = logits.abs()
    safe = t.masked_fill(t < _SERIES, 1)
    away = 0.5 * safe + (-(-safe).expm1()).log() - safe.log()
    even = torch.where(t < _SERIES, t.square() / 24, away)
    return 0.5 * logits + even
