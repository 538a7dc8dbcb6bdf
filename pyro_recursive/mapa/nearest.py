"""The k nearest of many data under a kernel, in bounded memory."""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_recursive.mapa.approximate import FaissScreen, has_faiss
from pyro_recursive.mapa.kernel import InnerProductKernel, Kernel, LogKernel, check_data
from pyro_recursive.mapa.products import (
    FloatScreen,
    Products,
    ProductSearch,
    best_of_all,
    rounded,
)

__all__ = ["BACKENDS", "BUDGET", "Finder", "Neighbours", "backend_for", "nearest"]

BACKENDS = ("auto", "exact", "faiss")
BUDGET = 2**27  # bytes of one block
EXACT_ROWS = 60_000  # more references than these are searched by faiss, if it may and can
_MOST_FEATURES = 2**13  # longer ones, of many categories, are compared one by one
_SAMPLE = 1000  # references that show how long features are on both sides
_PROGRESS_DELAY = 2.0  # seconds: a shorter run needs no bar


class Neighbours(NamedTuple):
    """Rows of reference indices ``[Q, k]``, int64, and their log k in nats, float64, best first."""

    index: Tensor  # type: ignore[assignment]
    log_k: Tensor


class _Search(Protocol):
    def rows(self, k: int) -> int:
        """Return how many queries to search for at once."""

    def __call__(self, query: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Return columns and scores of the best, ``[B, k]`` both, best first."""


class Finder:
    """Finds the k nearest of a reference, under a kernel, for any queries; prepared once.

    See `nearest` for the arguments.
    """

    def __init__(
        self, kernel: LogKernel, reference: Tensor, backend: str = "auto", budget: int = BUDGET
    ) -> None:
        if budget < 1:
            raise ValueError(f"budget must be a positive number of bytes, got {budget}")
        self.kernel, self.reference = kernel, reference
        _check(kernel, reference)
        self.backend = backend_for(kernel, reference, backend)
        self._search: _Search = _search_of(kernel, reference, self.backend, budget)

    @torch.no_grad()
    def __call__(
        self, query: Tensor, k: int, *, own: bool = False, progress: bool = True
    ) -> Neighbours:
        """Return the neighbours of queries ``[Q, *x]``."""
        self._check_query(query, k, own)
        size = self._search.rows(k)
        found = []
        with tqdm(
            total=len(query),
            desc="neighbours",
            unit=" rows",
            delay=_PROGRESS_DELAY,
            leave=False,
            disable=None if progress else True,  # None: shown on terminals alone
        ) as bar:
            for start in range(0, len(query), size):
                block = query[start : start + size].to(self.reference.device)
                found.append(self._of_block(block, start if own else None, k))
                bar.update(len(block))
        return Neighbours(*map(torch.cat, zip(*found, strict=True)))

    def _of_block(self, query: Tensor, start: int | None, k: int) -> Neighbours:
        own = None
        if start is not None:
            own = torch.arange(start, start + len(query), device=query.device)
        index, scores = self._search(query, own, k)
        lost = ~(scores[:, 0] > -math.inf)  # nan too
        if lost.any():
            row = int(lost.nonzero()[0])
            raise ValueError(
                f"log k is {float(scores[row, 0])} between row {row + (start or 0)} and all "
                "references: give a kernel with wider tails, so that each row has a neighbour"
            )
        if isinstance(self.kernel, Kernel):
            scores = self.kernel.rescaled(scores, math.prod(query.shape[1:]))
        return Neighbours(index, scores)

    def _check_query(self, query: Tensor, k: int, own: bool) -> None:
        _check(self.kernel, query)
        number = len(self.reference)
        if query.shape[1:] != self.reference.shape[1:]:
            raise ValueError(
                f"queries have shape {list(query.shape[1:])} a row, and the references "
                f"{list(self.reference.shape[1:])}: give data of one shape"
            )
        if not 1 <= k <= number:
            raise ValueError(f"k must be from 1 to the {number} references, got {k}")
        if own and len(query) != number:
            raise ValueError(
                f"own=True says that the queries are the references, and there are {len(query)} "
                f"and {number}"
            )


def nearest(
    query: Tensor,
    reference: Tensor,
    kernel: LogKernel,
    k: int,
    *,
    own: bool = False,
    backend: str = "auto",
    budget: int = BUDGET,
    progress: bool = True,
) -> Neighbours:
    """Return, for each query, the k references with the largest log k, and these, best first.

    Of equal ones the query's own index is first (with ``own``), then the lower index. Log k are
    rounded to about eleven digits of their largest terms, so that ties do not hang on the machine.

    Arguments:
        query: ``[Q, *x]``, moved to the reference's device block by block.
        reference: ``[R, *x]``.
        kernel: one of `pyro_recursive.mapa.kernels`, or any function
            ``(query [Q, *x], reference [R, *x]) -> [Q, R]`` of log weights. A function sees blocks
            of both, and must treat each pair by itself.
        k: from 1 to R.
        own: query and reference are the same rows.
        backend: ``"exact"``; ``"faiss"``, approximate and faster for very many references, for
            kernels that are inner products; ``"auto"``: exact up to 60,000 references, and faiss
            beyond where it is installed and the kernel allows it.
        budget: bytes of one block of scores; beside these, kernels that are inner products take
            about 12 bytes (16 with faiss) for each of the references' features.
        progress: show a bar, on terminals, in runs of more than two seconds.

    Raises:
        ImportError: faiss is asked for and not installed.
        ValueError: data do not suit the kernel; the kernel returns nan or +inf, or -inf between a
            query and all references; k or the shapes are wrong; faiss cannot serve the kernel.

    Cost: the exact search of kernels that are inner products is one float32 matrix product, about
    a minute for MNIST's 60,000 images on two CPU cores; others take what Q R values of theirs take.

    >>> from pyro_recursive.mapa.kernels import Gaussian
    >>> x = torch.tensor([[0.0], [1.0], [5.0], [5.5]])
    >>> nearest(x, x, Gaussian(1.0), k=2, own=True).index
    tensor([[0, 1],
            [1, 0],
            [2, 3],
            [3, 2]])
    """
    finder = Finder(kernel, reference, backend, budget)
    return finder(query, k, own=own, progress=progress)


def backend_for(kernel: LogKernel, reference: Tensor, backend: str) -> str:
    """Return ``"exact"`` or ``"faiss"``; raise ValueError where faiss cannot serve the kernel."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    suits = _is_product(kernel, reference)
    if backend == "faiss" and not suits:
        raise ValueError(
            f"faiss needs a kernel that is an inner product, and {kernel!r} is none (or has more "
            f"than {_MOST_FEATURES} features): give backend='exact'"
        )
    if backend != "auto":
        return backend
    if not suits or len(reference) <= EXACT_ROWS:
        return "exact"
    if has_faiss():
        return "faiss"
    warnings.warn(
        f"an exact search of {len(reference)} references takes time that grows with their square; "
        "pip install 'pyro_recursive[neighbours]' brings faiss, and backend='exact' hides this",
        stacklevel=3,
    )
    return "exact"


class _PlainSearch:
    """The k best of each query, for any kernel: all scores of some rows at a time."""

    def __init__(self, kernel: LogKernel, reference: Tensor, budget: int) -> None:
        scores: Callable[[Tensor, Tensor], Tensor] = kernel
        if isinstance(kernel, Kernel):
            scores = kernel.scores
        self.kernel, self.scores, self.reference, self.budget = kernel, scores, reference, budget

    def rows(self, k: int) -> int:
        return max(1, self.budget // (64 * len(self.reference)))

    def __call__(self, query: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        per_pair = 8 * math.prod(query.shape[1:])  # should the kernel take all differences
        parts = self.reference.split(max(1, self.budget // (len(query) * per_pair)))
        scores = torch.cat([self._of_part(query, part) for part in parts], 1)
        reach = scores.abs().masked_fill(scores.isinf(), 0)
        return best_of_all(rounded(scores, reach), own, k)

    def _of_part(self, query: Tensor, part: Tensor) -> Tensor:
        scores = self.scores(query, part)
        if scores.shape != (len(query), len(part)):
            raise ValueError(
                f"{self.kernel!r} returned shape {list(scores.shape)} for {len(query)} queries and "
                f"{len(part)} references; it must be {[len(query), len(part)]}"
            )
        if scores.isnan().any() or (scores == math.inf).any():
            raise ValueError(f"{self.kernel!r} returned nan or +inf; log k must be below +inf")
        return scores.to(torch.float64)


def _search_of(kernel: LogKernel, reference: Tensor, backend: str, budget: int) -> _Search:
    if not isinstance(kernel, InnerProductKernel) or not _is_product(kernel, reference):
        return _PlainSearch(kernel, reference, budget)
    products = Products(kernel, reference, budget)
    if backend == "faiss":
        return ProductSearch(products, FaissScreen(products, reference[:_SAMPLE]))
    return ProductSearch(products, FloatScreen(products))


def _is_product(kernel: LogKernel, reference: Tensor) -> bool:
    return isinstance(kernel, InnerProductKernel) and kernel.width(reference) <= _MOST_FEATURES


def _check(kernel: LogKernel, data: Tensor) -> None:
    if isinstance(kernel, Kernel):
        kernel.check(data)
    elif data.is_floating_point():
        check_data(kernel, data)
