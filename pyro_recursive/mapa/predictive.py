"""Kernels of bits, intensities and categories: the posterior predictive of x_n after x_i.

Each likelihood has its conjugate prior, weak by default: Jeffreys'. The data of a row are flattened
and independent given the parameters.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_recursive.mapa.kernel import (
    Features,
    InnerProductKernel,
    check_data,
    check_positive,
    flat,
    parts_of_pairs,
)

__all__ = ["Bernoulli", "Categorical", "ContinuousBernoulli"]

_NEWTON_STEPS = 8  # six are enough in float64
_SERIES = 1e-2  # below this, differences would lose more digits than the series' next term has


@dataclass(frozen=True, repr=False)
class Bernoulli(InnerProductKernel):
    """The kernel of binary data: each bit of x_i, softened, is the mean of that of x_n.

    ``log k = sum_d log Bernoulli(x_nd; a + (1 - 2 a) x_id)``, which is ``H log(a / (1 - a))`` and a
    constant, where H is the number of bits that differ. It is the posterior predictive under a
    prior Beta(c, c), with ``a = c / (2 c + 1)``: 1/3 for a flat prior, 1/4 for Jeffreys' c = 1/2,
    the default. Where decoders are sharp, a smaller ``a`` is nearer to their posterior.

    Grey values in [0, 1] stand for the mean of a random bit. On the side of x_i they set the mean
    ``a + (1 - 2 a) x_i``, which is that over these bits. On the side of x_n, log k is the mean
    over the bits: minus the cross entropy, no density of grey values.

    Arguments:
        concentration: c.
        softening: a, below 1/2, instead of c.

    Raises ValueError where both are given or out of range, and for data outside [0, 1].

    Sources: `Towards Model-Agnostic Posterior Approximation for Fast and Accurate Variational
    Autoencoders` (Yacoby et al., arXiv 2403.08941), which softens bits; the prior's part is ours.

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

    def check(self, data: Tensor) -> None:
        """Raise ValueError for data outside [0, 1]."""
        check_data(self, data, least=0, most=1)

    def query_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return the bits."""
        rows = flat(data)
        return Features(rows, rows.new_zeros(len(rows)))

    def reference_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return logits of the softened bits, and the log-probability of zeros."""
        means = self.a + (1 - 2 * self.a) * flat(data)
        log_zero = (-means).log1p()
        return Features(means.log() - log_zero, log_zero.sum(-1))


@dataclass(frozen=True, repr=False)
class ContinuousBernoulli(InnerProductKernel):
    """The kernel of intensities in [0, 1]: a continuous Bernoulli whose mean is x_i.

    Its most likely parameter after x_i alone is that with mean x_i: not the ``probs`` of the
    distribution, which are its mean for binary data only. Means are kept in [margin, 1 - margin],
    as the density would be a spike otherwise.

    There is no closed predictive density. The plug-in leaves out the noise of x_i itself, so that
    a wide margin does better than its name says.

    Raises ValueError unless ``0 < margin < 1/2``, and for data outside [0, 1].

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

    def check(self, data: Tensor) -> None:
        """Raise ValueError for data outside [0, 1]."""
        check_data(self, data, least=0, most=1)

    def query_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return the intensities."""
        rows = flat(data)
        return Features(rows, rows.new_zeros(len(rows)))

    def reference_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return the logits with these means, and the logarithms of the density at zero."""
        logits = _logits_of_mean(flat(data).clamp(self.margin, 1 - self.margin))
        return Features(logits, -_log_normaliser(logits).sum(-1))


@dataclass(frozen=True, repr=False)
class Categorical(InnerProductKernel):
    """The kernel of data that are categories: x_i, softened, is the distribution of x_n.

    ``log k = sum_d log((1[x_nd = x_id] + c) / (1 + C c))``: the posterior predictive under a
    symmetric Dirichlet prior with concentration c. Data ``[R, *x]`` are the numbers of categories,
    0 to C - 1; with ``one_hot`` they are ``[R, *x, C]`` with a single 1 in each vector of C.

    Raises ValueError for numbers out of range, and for data that are no categories.

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
        numbers = self._numbers(data)
        rows = torch.nn.functional.one_hot(numbers, self.num_categories)
        return Features(flat(rows), flat(rows).new_zeros(len(rows)))

    def reference_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return one-hot vectors times what a match counts, and the worth of no match."""
        rows, zeros = self.query_features(data, origin)
        match, none = self._terms()
        return Features(rows * match, zeros + self._numbers(data).shape[1] * none)

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k by comparing, ``[Q, R]``, float64: one-hot vectors may be very long."""
        match, none = self._terms()
        left, right = self._numbers(query), self._numbers(reference)
        matches = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
        for part in parts_of_pairs(left, right):
            matches += (left[:, None, part] == right[:, part]).sum(-1)
        return matches * match + left.shape[1] * none

    def _terms(self) -> tuple[float, float]:
        """Return what a match adds, and the log-probability of another category."""
        c = self.concentration
        return math.log1p(1 / c), math.log(c / (1 + self.num_categories * c))

    def _numbers(self, data: Tensor) -> Tensor:
        numbers = data.to(torch.uint8).argmax(-1) if self.one_hot else data.long()
        return numbers.reshape(len(data), -1)


def _logits_of_mean(mean: Tensor) -> Tensor:
    """Return the logits of continuous Bernoullis with given means in (0, 1), by Newton's method.

    Means grow with the logit, and bend towards 1/2 from the start on, which lies between the root
    and zero: so each step stops short of the root, and the next is shorter still.
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
