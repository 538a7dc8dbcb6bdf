"""Base classes of kernels: log-weights of how well one datum explains another, in nats.

A kernel is any callable ``log_kernel(query [Q, *x], reference [R, *x]) -> [Q, R]``. The kernels of
this package also check their data and, where they are inner products, give the features of both
sides, which makes a search for neighbours a matrix product.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK_NUMBERS = 2**22  # pairs times dimensions at once
_SAMPLE = 1000

LogKernel = Callable[[Tensor, Tensor], Tensor]


class Features(NamedTuple):
    """Rows ``[R, F]`` and biases ``[R]`` of one side of an inner product, float64."""

    rows: Tensor
    bias: Tensor


class Kernel(ABC):
    """``log k(x_n, x_i)``, the log-weight of the datum x_i as an explanation of x_n, in nats.

    A subclass defines ``__call__``. Make it a frozen dataclass of numbers: its ``repr`` then names
    it in caches.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Laplace(Kernel):
    ...     scale: float
    ...     def __call__(self, query, reference):
    ...         return -torch.cdist(query, reference, p=1) / self.scale
    >>> Laplace(2.0)(torch.zeros(1, 3), torch.ones(2, 3))
    tensor([[-1.5000, -1.5000]])
    """

    @abstractmethod
    def __call__(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k for queries ``[Q, *x]`` and references ``[R, *x]``: ``[Q, R]`` nats."""

    def check(self, data: Tensor) -> None:
        """Raise ValueError for data outside the kernel's support."""
        check_data(self, data)

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return numbers ``[Q, R]`` with the order of log k in each row, for checked data."""
        return self(query, reference)

    def rescaled(self, scores: Tensor, size: int) -> Tensor:
        """Return log k for rows of scores ``[Q, k]``, by a map that keeps each row's order.

        ``size`` is the number of dimensions of a datum. A bandwidth that depends on a whole row is
        found here, from the scores of the nearest.
        """
        return scores

    @property
    def cache_key(self) -> str | None:
        """A name for files; None where the ``repr`` does not identify the kernel."""
        plain = (int, float, str, tuple, type(None))  # a tensor's repr is not all of it
        if is_dataclass(self) and not all(
            isinstance(getattr(self, field.name), plain) for field in fields(self)
        ):
            return None
        return repr(self)

    def __repr__(self) -> str:
        """Show the numbers that are given."""
        if not is_dataclass(self):
            return super().__repr__()
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        given = ", ".join(f"{name}={value!r}" for name, value in named if value is not None)
        return f"{type(self).__name__}({given})"


class ScoreKernel(Kernel):
    """A kernel defined by its `scores`."""

    @abstractmethod
    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return numbers ``[Q, R]``, float64, with the order of log k in each row."""

    def __call__(self, query: Tensor, reference: Tensor) -> Tensor:
        """Return log k, ``[Q, R]`` nats, float64."""
        self.check(query)
        self.check(reference)
        if query.shape[1:] != reference.shape[1:]:
            raise ValueError(
                f"{self!r} got queries of shape {list(query.shape[1:])} and references of shape "
                f"{list(reference.shape[1:])}"
            )
        return self.rescaled(self.scores(query, reference), math.prod(reference.shape[1:]))


class InnerProductKernel(ScoreKernel):
    """A kernel whose scores are inner products, up to terms of one side.

    ``score(x_n, x_i) = q(x_n) @ r(x_i) + a(x_n) + b(x_i)``. Features are float64, since the scores
    are often small differences of large numbers.

    ``origin`` ``[D]`` is a central point of the flattened data. Kernels of differences measure from
    it, so that data far from zero lose no digits; others ignore it.
    """

    @abstractmethod
    def query_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return ``q`` and ``a`` for data ``[Q, *x]``."""

    @abstractmethod
    def reference_features(self, data: Tensor, origin: Tensor) -> Features:
        """Return ``r`` and ``b`` for data ``[R, *x]``."""

    def width(self, data: Tensor) -> int:
        """Return the number of features F of a datum."""
        return math.prod(data.shape[1:])

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
    """Return the median of some rows of flattened data, ``[D]``.

    >>> origin_of(torch.tensor([[1.0], [2.0], [1e9]]))
    tensor([2.], dtype=torch.float64)
    """
    step = -(-len(data) // _SAMPLE)
    # A copy, as PyTorch 2.13 returns uninitialised memory as the median of an expanded tensor.
    return flat(data[::step]).clone(memory_format=torch.contiguous_format).median(0).values


def check_data(
    kernel: object,
    data: Tensor,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    whole: bool = False,
    above: bool = False,
) -> None:
    """Raise ValueError for data out of a range, for fractions, nan and infinity.

    ``above`` leaves out ``least`` itself.
    """
    if data.dim() < 1 or not data.numel():
        raise ValueError(f"{kernel!r} needs rows of data [R, *x], got shape {list(data.shape)}")
    if data.is_complex():
        raise ValueError(f"{kernel!r} needs real numbers, got {data.dtype}")
    numbers = data if data.dtype != torch.bool else data.to(torch.uint8)
    low, high = (float(value) for value in torch.aminmax(numbers))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{kernel!r} needs finite data")
    if low < least or high > most or (above and low == least):
        interval = f"{'(' if above else '['}{least:g}, {most:g}{')' if most == math.inf else ']'}"
        raise ValueError(f"{kernel!r} needs data in {interval}, got {low:g} to {high:g}")
    if whole and data.is_floating_point() and (data != data.floor()).any():
        raise ValueError(f"{kernel!r} needs whole numbers, got fractions")


def check_positive(kernel: object, zero: bool = False, **values: float | None) -> None:
    """Raise ValueError for a given number that is not positive (or ``zero``) and finite."""
    for name, value in values.items():
        if value is not None and not (0 < value < math.inf or (zero and value == 0)):
            what = "finite and not negative" if zero else "positive and finite"
            raise ValueError(f"{type(kernel).__name__}: {name} must be {what}, got {value}")


def parts_of_pairs(left: Tensor, right: Tensor) -> list[slice]:
    """Return slices of the dimensions so that all pairs of rows fit into memory."""
    size = max(1, _CHUNK_NUMBERS // max(1, len(left) * len(right)))
    return [slice(start, start + size) for start in range(0, left.shape[1], size)]
