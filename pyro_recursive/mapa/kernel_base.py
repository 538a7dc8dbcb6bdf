"""Base classes of kernels: log-weights of how well one datum explains another, in nats.

A kernel is any callable ``log_kernel(query [Q, *x], reference [R, *x]) -> [Q, R]``. The kernels of
this package also check their data and, where they are inner products, give the features of both
sides, which makes a search for neighbours a matrix product.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import ClassVar, NamedTuple

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

    A subclass defines `scores`. Make it a frozen dataclass of numbers: its ``repr`` then names it
    in caches.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Laplace(Kernel):
    ...     scale: float
    ...     def scores(self, query, reference):
    ...         return -torch.cdist(query, reference, p=1) / self.scale
    >>> Laplace(2.0)(torch.zeros(1, 3), torch.ones(2, 3))
    tensor([[-1.5000, -1.5000]])
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


class InnerProductKernel(Kernel):
    """A kernel whose scores are inner products, up to terms of one side.

    ``score(x_n, x_i) = q(x_n) @ r(x_i) + a(x_n) + b(x_i)``. Features are float64, since the scores
    are often small differences of large numbers.

    ``origin`` ``[D]`` is a central point of the flattened data. Kernels of differences measure from
    it, so that data far from zero lose no digits; others ignore it.
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
    """Return the median of some rows of flattened data, ``[D]``.

    >>> origin_of(torch.tensor([[1.0], [2.0], [1e9]]))
    tensor([2.], dtype=torch.float64)
    """
    step = -(-len(data) // _SAMPLE)
    # A copy, as PyTorch 2.13 returns uninitialised memory as the median of an expanded tensor.
    return flat(data[::step]).clone(memory_format=torch.contiguous_format).median(0).values


def sum_of_pairs(term: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return ``sum_d term(x_d, y_d)`` of all pairs of rows, ``[Q, D]`` and ``[R, D]``: ``[Q, R]``.

    A few dimensions at once, so that the pairs fit into memory.
    """
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
        raise ValueError(
            f"{kernel!r} needs data in [{least:g}, {most:g}], got {low:g} to {high:g}."
        )
    if whole and data.is_floating_point() and (data != data.floor()).any():
        raise ValueError(f"{kernel!r} needs whole numbers.")


def check_positive(kernel: object, zero: bool = False, **values: float | None) -> None:
    """Raise ValueError for a given number that is not positive (or ``zero``) and finite."""
    for name, value in values.items():
        if value is not None and not (0 < value < math.inf or (zero and value == 0)):
            what = "finite and not negative" if zero else "positive and finite"
            raise ValueError(f"{type(kernel).__name__}: {name} must be {what}, got {value}.")
