"""Kernels, log-weights of how well one datum explains another: base classes, and distances.

A kernel is any callable ``log_kernel(query [Q, *x], reference [R, *x]) -> [Q, R]``. Those that are
inner products give the features of both sides: a search for neighbours is then a matrix product.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

_CHUNK_NUMBERS = 2**22  # pairs times dimensions at once
_SAMPLE = 1000
_BISECTIONS = 60
_WIDEST = 690.0  # log-factors, nearly all that float64 has: rows may have outliers

LogKernel = Callable[[Tensor, Tensor], Tensor]


class Features(NamedTuple):
    """Rows ``[R, F]`` and biases ``[R]`` of one side of an inner product, float64."""

    rows: Tensor
    bias: Tensor


class Kernel(ABC):
    """``log k(x_n, x_i)``, the log-weight of the datum x_i as an explanation of x_n, in nats.

    A subclass defines `scores`. Make it a frozen dataclass of numbers: its ``repr`` then names it
    in caches.
    """

    support: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    whole: ClassVar[bool] = False  # numbers

    @abstractmethod
    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return numbers ``[Q, R]`` with the order of log k in each row, for checked data."""

    def __call__(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k for queries ``[Q, *x]`` and references ``[R, *x]``: ``[Q, R]`` nats."""
        self.check(query)
        self.check(reference)
        check_shapes(query, reference)
        return self.rescaled(self.scores(query, reference), math.prod(reference.shape[1:]))

    def check(self, data: Tensor) -> None:
        """Raise ValueError for data outside the kernel's support."""
        check_data(self, data, *self.support, whole=self.whole)

    def rescaled(self, scores: Tensor, size: int) -> Tensor:
        """Return log k for rows of scores ``[Q, k]`` of the nearest, in the same order.

        ``size`` is the number of dimensions of a datum.
        """
        return scores

    @property
    def cache_key(self) -> str | None:
        """A name for files; None where the ``repr`` does not identify the kernel."""
        plain = (int, float, str, tuple, type(None))  # a tensor's repr is not all of it
        named = is_dataclass(self) and all(isinstance(v, plain) for v in vars(self).values())
        return repr(self) if named else None

    def __repr__(self) -> str:
        """Show the numbers that are given."""
        if not is_dataclass(self):
            return super().__repr__()
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        given = ", ".join(f"{name}={value!r}" for name, value in named if value is not None)
        return f"{type(self).__name__}({given})"


class InnerProductKernel(Kernel):
    """A kernel whose scores are inner products, up to terms of one side.

    ``score(x_n, x_i) = q(x_n) @ r(x_i) + a(x_n) + b(x_i)``, all in float64. Kernels of differences
    measure from ``origin`` ``[D]``, a central point, so that data far from zero lose no digits.
    """

    @abstractmethod
    def reference_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return ``r`` and ``b`` for data ``[R, *x]``."""

    def query_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return ``q`` and ``a`` for data ``[Q, *x]``: by default the data and zero."""
        rows = flat(data)
        return Features(rows, rows.new_zeros(len(rows)))

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return the inner products with the terms of both sides, ``[Q, R]``, float64."""
        origin = origin_of(reference)
        left = self.query_features(query, origin)
        right = self.reference_features(reference, origin)
        return torch.addmm(right.bias, left.rows, right.rows.T) + left.bias[:, None]


def flat(data: Tensor) -> Tensor:
    """Return data ``[R, *x]`` as rows of float64 numbers ``[R, D]``."""
    return data.reshape(len(data), math.prod(data.shape[1:])).to(torch.float64)


def origin_of(data: Tensor) -> Tensor:
    """Return the median of some rows of flattened data, ``[D]``."""
    step = -(-len(data) // _SAMPLE)
    # A copy, as PyTorch 2.13 returns uninitialised memory as the median of an expanded tensor.
    return flat(data[::step]).clone(memory_format=torch.contiguous_format).median(0).values


def sum_of_pairs(term: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return ``sum_d term(x_d, y_d)`` of all pairs of ``[Q, D]`` and ``[R, D]``: ``[Q, R]``."""
    size = max(1, _CHUNK_NUMBERS // max(1, len(x) * len(y)))
    total = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for left, right in zip(x.split(size, 1), y.split(size, 1), strict=True):
        total += term(left[:, None], right).sum(-1)
    return total


def check_shapes(query: Tensor, reference: Tensor) -> None:
    """Raise ValueError for data of different shapes, which might broadcast."""
    one, other = list(query.shape[1:]), list(reference.shape[1:])
    if one != other:
        raise ValueError(f"Queries have shape {one} a row, and references {other}.")


def check_data(
    kernel: object,
    data: Tensor,
    least: float = -math.inf,
    most: float = math.inf,
    whole: bool = False,
) -> None:
    """Raise ValueError for data out of a range, for fractions, nan and infinity."""
    low, high = (float(value) for value in torch.aminmax(data))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{kernel!r} needs finite data.")
    if low < least or high > most:
        raise ValueError(f"{kernel!r} needs data in [{least:g}, {most:g}], got {low:g}, {high:g}.")
    if whole and data.is_floating_point() and (data != data.floor()).any():
        raise ValueError(f"{kernel!r} needs whole numbers.")


def check_positive(kernel: object, zero: bool = False, **values: float | None) -> None:
    """Raise ValueError for a given number that is not positive (or ``zero``) and finite."""
    for name, value in values.items():
        if value is not None and not (0 < value < math.inf or (zero and value == 0)):
            what = "finite and not negative" if zero else "positive and finite"
            raise ValueError(f"{type(kernel).__name__}: {name} must be {what}, got {value}.")


class _Euclidean(InnerProductKernel):
    """A kernel whose scores are minus half the squared distances, in a unit of length."""

    @property
    @abstractmethod
    def unit(self) -> float | Tensor:
        """One unit, or one for each flattened dimension."""

    def query_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return ``(x - origin) / unit`` and minus half its squared length."""
        rows = flat(data) - origin
        rows = rows / torch.as_tensor(self.unit, dtype=rows.dtype, device=rows.device)
        return Features(rows, -0.5 * rows.square().sum(-1))

    reference_features = query_features


@dataclass(frozen=True, repr=False)
class Gaussian(_Euclidean):
    """The kernel of data with normal noise: ``log k = log N(x_n; x_i, h ** 2 I)``.

    For noise of a known ``scale`` the default ``h = sqrt(2) * scale`` is the posterior predictive
    of x_n after x_i under a flat prior on the mean. ``perplexity`` gives each row a bandwidth of
    its own, so that its weights over the nearest k have that perplexity, the exponential of their
    entropy: ``log k = -|x_n - x_i| ** 2 / 2 h_n ** 2``, which is no density.

    Args:
        scale: the noise's standard deviation, or a tuple of one for each flattened dimension.
        bandwidth: h, in place of ``sqrt(2) * scale``.
        perplexity: above 1, and below the number k of neighbours.

    Sources: `Towards Model-Agnostic Posterior Approximation` (Yacoby et al., arXiv 2403.08941);
    perplexity: `Visualizing Data using t-SNE` (van der Maaten & Hinton, JMLR 2008).

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> Gaussian(0.5)(x, x).round(decimals=3)
    tensor([[-1.1450, -2.1450],
            [-2.1450, -1.1450]], dtype=torch.float64)
    """

    scale: float | tuple[float, ...] | None = None
    bandwidth: float | tuple[float, ...] | None = None
    perplexity: float | None = None

    def __post_init__(self) -> None:
        """Check that the bandwidth is given in one way."""
        given = [self.scale, self.bandwidth, self.perplexity]
        if sum(value is not None for value in given) != 1:
            raise ValueError(f"Give one of scale, bandwidth and perplexity, got {self!r}.")
        if not (torch.as_tensor(self.unit) > 0).all():
            raise ValueError(f"The bandwidth must be positive, got {self!r}.")

    @property
    def unit(self) -> float | Tensor:
        """The bandwidth h; 1 where each row has its own."""
        if self.perplexity is not None:
            return 1.0
        if self.scale is not None:
            return math.sqrt(2) * torch.as_tensor(self.scale, dtype=torch.float64)
        return torch.as_tensor(self.bandwidth, dtype=torch.float64)

    def rescaled(self, scores: Tensor, size: int) -> Tensor:
        """Return the logarithm of the normal density, or rows of the perplexity."""
        if self.perplexity is not None:
            return of_perplexity(scores, self.perplexity)
        log_h = torch.as_tensor(self.unit).log().expand(size).sum().item()
        return scores - (0.5 * size * math.log(2 * math.pi) + log_h)


@dataclass(frozen=True, repr=False)
class StudentT(_Euclidean):
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

    @property
    def unit(self) -> float:
        """The scale of the t."""
        return math.sqrt(2) * self.scale

    def rescaled(self, scores: Tensor, size: int) -> Tensor:
        """Return the logarithm of the t density."""
        total = 0.5 * (self.degrees + size)
        log_norm = math.lgamma(total) - math.lgamma(0.5 * self.degrees)
        log_norm -= 0.5 * size * math.log(2 * math.pi * self.degrees * self.scale**2)
        return log_norm - total * (-2 * scores.clamp(max=0) / self.degrees).log1p()


@dataclass(frozen=True, repr=False)
class Distance(Kernel):
    """A kernel made of any distance: ``log k = -distance(x_n, x_i) ** 2 / 2 h ** 2``.

    ``distance(query [Q, *x], reference [R, *x])`` returns ``[Q, R]``: dynamic time warping of time
    series, for example. It need not be symmetric. The bandwidth is given, or found for each row by
    its ``perplexity`` as in `Gaussian`.

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
            raise ValueError("Distance: give either bandwidth or perplexity.")
        check_positive(self, bandwidth=self.bandwidth)

    def check(self, data: Tensor) -> None:
        """Accept any data."""

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return minus half the squared distances, in units of the bandwidth if there is one."""
        distances = self.distance(query, reference).to(torch.float64)
        if distances.shape != (len(query), len(reference)) or not (distances >= 0).all():
            raise ValueError("distance must return [Q, R] numbers, none of them negative or nan.")
        return -0.5 * (distances / (self.bandwidth or 1.0)).square()

    def rescaled(self, scores: Tensor, size: int) -> Tensor:
        """Return rows of the perplexity, where one is given."""
        return scores if self.perplexity is None else of_perplexity(scores, self.perplexity)


def of_perplexity(scores: Tensor, perplexity: float) -> Tensor:
    """Return each row of ``[Q, k]`` times the factor that gives its softmax a perplexity.

    A row with more equal best scores than the perplexity gets the least possible, their number.
    """
    if not 1 < perplexity < scores.shape[-1]:
        raise ValueError(f"Perplexity {perplexity:g} is not between 1 and k = {scores.shape[-1]}.")
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
