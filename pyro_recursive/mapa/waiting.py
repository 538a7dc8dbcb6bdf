"""Kernels of counts and of positive data, whose likelihoods have gamma priors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_recursive.mapa.kernel import (
    Kernel,
    check_data,
    check_pair,
    check_positive,
    flat,
    parts_of_pairs,
)

__all__ = ["Exponential", "Gamma", "Poisson"]


@dataclass(frozen=True, repr=False)
class Poisson(Kernel):
    """The kernel of counts: a negative binomial around each count of x_i.

    The posterior predictive under a prior Gamma(shape, rate) on the means, by default Jeffreys':
    ``log k = sum_d log NegativeBinomial(x_nd; shape + x_id, odds of 1 to rate + 1)``.

    Raises ValueError for numbers out of range, and for data that are no counts.

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
        _check_rate(self, self.rate)

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

    def __call__(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k, ``[Q, R]`` nats, float64."""
        check_pair(self, query, reference)
        return self.scores(query, reference)


@dataclass(frozen=True, repr=False)
class Gamma(Kernel):
    """The kernel of positive data whose likelihood is a gamma of a known concentration.

    The posterior predictive under a prior Gamma(shape, rate) on the likelihood's rates, a compound
    gamma, with m for the concentration:
    ``k = prod_d x_nd ** (m - 1) (rate + x_id) ** (shape + m) / (rate + x_id + x_nd) **
    (shape + 2 m)`` over ``B(m, shape + m)``. The default is Jeffreys' prior: ratios alone count.

    Raises ValueError for numbers out of range, and for data that are not positive; 0 is allowed
    where rate > 0 and the concentration is 1.

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
        _check_rate(self, self.rate)
        if not 0 <= self.shape < math.inf:
            raise ValueError(f"shape must be finite and not negative, got {self.shape}")

    def check(self, data: Tensor) -> None:
        """Raise ValueError for data that are not positive."""
        zero = self.rate > 0 and self.concentration == 1
        check_data(self, data, least=0, above=not zero)

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k, ``[Q, R]``, float64."""
        m, known = self.concentration, self.shape + self.concentration
        x, rate = flat(query), flat(reference) + self.rate
        left = torch.xlogy(torch.full_like(x, m - 1), x) - _log_beta(m, known)
        total = left.sum(-1)[:, None] + known * rate.log().sum(-1)
        for part in parts_of_pairs(x, rate):
            total -= (known + m) * (x[:, None, part] + rate[:, part]).log().sum(-1)
        return total

    def __call__(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k, ``[Q, R]`` nats, float64."""
        check_pair(self, query, reference)
        return self.scores(query, reference)


def Exponential(shape: float = 0.0, rate: float = 0.0) -> Gamma:
    """Return the kernel of data whose likelihood is exponential: Lomax densities around x_i.

    A gamma of concentration 1, see `Gamma`:
    ``k = prod_d (shape + 1) (rate + x_id) ** (shape + 1) / (rate + x_id + x_nd) ** (shape + 2)``.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> Exponential()(x, x).exp().round(decimals=4)
    tensor([[0.2500, 0.1875],
            [0.0625, 0.0833]], dtype=torch.float64)
    """
    return Gamma(1.0, shape, rate)


def _check_rate(kernel: object, rate: float) -> None:
    if not 0 <= rate < math.inf:
        raise ValueError(
            f"{type(kernel).__name__}: rate must be finite and not negative, got {rate}"
        )


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
