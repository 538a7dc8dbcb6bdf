"""Kernels of distances: Gaussian, Student's t, and any distance of the user's."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_recursive.mapa.kernel_base import (
    Features,
    InnerProductKernel,
    ScoreKernel,
    check_positive,
    flat,
)

_BISECTIONS = 60
_WIDEST = 690.0  # log-factors, nearly all that float64 has: rows may have outliers


@dataclass(frozen=True, repr=False)
class Gaussian(InnerProductKernel):
    """The kernel of data with normal noise: ``log k = log N(x_n; x_i, h ** 2 I)``.

    For noise of a known ``scale`` the default ``h = sqrt(2) * scale`` is the posterior predictive
    of x_n after x_i under a flat prior on the mean. Data of many dimensions and few latents need
    wider bandwidths; see the page on MAPA. ``perplexity`` gives each row a bandwidth of its own, so
    that its weights over the nearest k have that perplexity, the exponential of their entropy:
    ``log k = -|x_n - x_i| ** 2 / 2 h_n ** 2``, which is no density.

    Args:
        scale: the noise's standard deviation, or a tuple of one for each flattened dimension.
        bandwidth: h, in place of ``sqrt(2) * scale``.
        perplexity: above 1, and below the number k of neighbours.

    Raises:
        ValueError: not exactly one of the three is given, and positive; data are not finite.

    Sources: `Towards Model-Agnostic Posterior Approximation for Fast and Accurate Variational
    Autoencoders` (Yacoby et al., arXiv 2403.08941); perplexity: `Visualizing Data using t-SNE`
    (van der Maaten & Hinton, JMLR 2008).

    >>> kernel = Gaussian(0.5)
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> kernel(x, x).round(decimals=3)
    tensor([[-1.1450, -2.1450],
            [-2.1450, -1.1450]], dtype=torch.float64)
    >>> rows = Gaussian(perplexity=30)(torch.randn(5, 2), torch.randn(200, 2)).softmax(-1)
    >>> torch.special.entr(rows).sum(-1).exp().round(decimals=6)
    tensor([30., 30., 30., 30., 30.], dtype=torch.float64)
    """

    scale: float | tuple[float, ...] | None = None
    bandwidth: float | tuple[float, ...] | None = None
    perplexity: float | None = None

    def __post_init__(self) -> None:
        """Check that the bandwidth is given in one way."""
        given = [self.scale, self.bandwidth, self.perplexity]
        if sum(value is not None for value in given) != 1:
            raise ValueError(f"give one of scale, bandwidth and perplexity; got {self!r}")
        for name in ("scale", "bandwidth"):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                check_positive(self, **{name: number})
        _check_perplexity(self.perplexity)

    def query_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return ``(x - origin) / h`` and the terms of the query in the normal density."""
        rows, log_volume = self._scaled(data, origin)
        return Features(rows, -0.5 * rows.square().sum(-1) - log_volume)

    def reference_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return ``(x - origin) / h`` and minus half its squared length."""
        rows, _ = self._scaled(data, origin)
        return Features(rows, -0.5 * rows.square().sum(-1))

    def rescaled(self, scores: Tensor, size: int) -> Tensor:
        """Return rows of the perplexity, where one is given."""
        return of_perplexity(scores, self.perplexity)

    def _scaled(self, data: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Return data measured from the origin in bandwidths, and the density's normaliser."""
        rows = flat(data) - origin
        if self.perplexity is not None:
            return rows, rows.new_zeros(())
        if self.bandwidth is not None:
            h = rows.new_tensor(self.bandwidth)
        else:
            h = math.sqrt(2) * rows.new_tensor(self.scale)
        if h.dim() and len(h) != rows.shape[1]:
            raise ValueError(
                f"Gaussian has {len(h)} scales for a datum of {rows.shape[1]} dimensions"
            )
        log_h = h.log().expand(rows.shape[1]).sum()
        return rows / h, 0.5 * rows.shape[1] * math.log(2 * math.pi) + log_h


@dataclass(frozen=True, repr=False)
class StudentT(InnerProductKernel):
    """The kernel of data with normal noise of a roughly known scale, one for a whole datum.

    The posterior predictive of x_n after x_i, for a flat prior on the mean and
    ``sigma ** 2 ~ InverseGamma(degrees / 2, degrees * scale ** 2 / 2)``: a multivariate t around
    x_i of scale ``sqrt(2) * scale``. With many degrees it is ``Gaussian(scale)``; with few, far
    data keep more weight.

    Source: `Conjugate Bayesian analysis of the Gaussian distribution` (Murphy 2007).

    >>> x = torch.tensor([[0.0], [5.0]])
    >>> StudentT(degrees=1, scale=0.5)(x, x).exp()  # Cauchy
    tensor([[0.4502, 0.0088],
            [0.0088, 0.4502]], dtype=torch.float64)
    """

    degrees: float
    scale: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_positive(self, degrees=self.degrees, scale=self.scale)

    def query_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return ``(x - origin) / h`` and minus half its squared length."""
        rows = (flat(data) - origin) / (math.sqrt(2) * self.scale)
        return Features(rows, -0.5 * rows.square().sum(-1))

    def reference_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return the same as for queries."""
        return self.query_features(data, origin)

    def rescaled(self, scores: Tensor, size: int) -> Tensor:
        """Return the logarithm of the t density; scores are minus half the squared distances."""
        total = 0.5 * (self.degrees + size)
        log_norm = math.lgamma(total) - math.lgamma(0.5 * self.degrees)
        log_norm -= 0.5 * size * math.log(2 * math.pi * self.degrees * self.scale**2)
        return log_norm - total * (-2 * scores.clamp(max=0) / self.degrees).log1p()


@dataclass(frozen=True, repr=False)
class Distance(ScoreKernel):
    """A kernel made of any distance: ``log k = -distance(x_n, x_i) ** 2 / 2 h ** 2``.

    ``distance(query [Q, *x], reference [R, *x])`` returns ``[Q, R]``: dynamic time warping of time
    series, for example. It need not be symmetric. The bandwidth is given, or found for each row by
    its ``perplexity`` as in `Gaussian`.

    Raises:
        ValueError: not exactly one of the two is given; distances are negative, nan, or of
            another shape.

    >>> def of_means(query, reference):
    ...     return torch.cdist(query.mean(1, keepdim=True), reference.mean(1, keepdim=True))
    >>> series = torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    >>> Distance(of_means, bandwidth=1.0)(series, series)
    tensor([[-0., -2.],
            [-2., -0.]], dtype=torch.float64)
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    bandwidth: float | None = None
    perplexity: float | None = None

    def __post_init__(self) -> None:
        """Check that the bandwidth is given in one way."""
        if (self.bandwidth is None) == (self.perplexity is None):
            raise ValueError("Distance: give either bandwidth or perplexity")
        check_positive(self, bandwidth=self.bandwidth)
        _check_perplexity(self.perplexity)

    @property
    def cache_key(self) -> None:
        """None: a function's ``repr`` does not identify it."""

    def check(self, data: Tensor) -> None:
        """Accept any data."""

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return minus half the squared distances, in units of the bandwidth if there is one."""
        distances = self.distance(query, reference)
        expected = [len(query), len(reference)]
        if list(distances.shape) != expected:
            raise ValueError(
                f"distance returned shape {list(distances.shape)}; it must be {expected}"
            )
        if not (distances >= 0).all():
            raise ValueError("distance returned negative numbers or nan; it must be 0 or more")
        return -0.5 * (distances.to(torch.float64) / (self.bandwidth or 1.0)).square()

    def rescaled(self, scores: Tensor, size: int) -> Tensor:
        """Return rows of the perplexity, where one is given."""
        return of_perplexity(scores, self.perplexity)


def of_perplexity(scores: Tensor, perplexity: float | None) -> Tensor:
    """Return each row of ``[Q, k]`` times the factor that gives its softmax a perplexity.

    By bisection of the factor's logarithm, for all rows at once; None leaves the rows unchanged. A
    row with more equal best scores than the perplexity gets the least possible, their number.

    Raises:
        ValueError: a row has no more entries than the perplexity.

    >>> of_perplexity(torch.tensor([[0.0, -1.0, -4.0]]), 2.0).softmax(-1)
    tensor([[0.6920, 0.2874, 0.0206]])
    """
    if perplexity is None:
        return scores
    if perplexity >= scores.shape[-1]:
        raise ValueError(
            f"a perplexity of {perplexity:g} needs more neighbours, and there are "
            f"{scores.shape[-1]}: lower the perplexity, or raise k"
        )
    below = scores - scores.amax(-1, keepdim=True)
    unit = -below.masked_fill(below.isinf(), 0).mean(-1, keepdim=True)
    below = below / unit.masked_fill(unit == 0, 1)
    low = torch.full_like(unit, -_WIDEST)
    high = -low
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        entropy = torch.special.entr((middle.exp() * below).softmax(-1)).sum(-1, keepdim=True)
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return high.exp() * below


def _check_perplexity(perplexity: float | None) -> None:
    if perplexity is not None and not 1 < perplexity < math.inf:
        raise ValueError(f"perplexity must be above 1 and finite, got {perplexity}")
