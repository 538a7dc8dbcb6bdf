"""The k nearest data under a kernel, exactly or by faiss, in bounded memory."""

import math
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_recursive.mapa.kernel_base import (
    InnerProductKernel,
    Kernel,
    LogKernel,
    check_data,
    origin_of,
)

BACKENDS = ("auto", "exact", "faiss")
BUDGET = 2**27  # bytes of one block
EXACT_ROWS = 60_000  # "auto" searches more references than these by faiss
_MOST_FEATURES = 2**13  # longer features, of many categories, are compared one by one
_SAMPLE = 1000  # references that show how long features are on both sides
_PROGRESS_DELAY = 2.0  # seconds: a shorter run needs no bar
_CHUNK_BYTES = 2**23  # of gathered features: what a cache holds
_DIGITS = 38  # binary digits that survive the rounding of scores
_TINY, _HUGE = 1e-37, 1e30  # beyond these float32 loses more than its roundoff
# Unit roundoff of float32 products, by torch.get_float32_matmul_precision().
_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}


class Neighbours(NamedTuple):
    """Reference indices ``[Q, k]``, int64, and their log k in nats, float64, best first."""

    index: Tensor  # type: ignore[assignment]
    log_k: Tensor


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
    """Return, for each query, the k references with the largest log k, best first.

    Ties go to the query's own index (with ``own``), then to the lower index. Log k are rounded to
    about eleven digits of their largest terms, so that ties are the same on every machine.

    Args:
        query: ``[Q, *x]``, moved to the reference's device block by block.
        reference: ``[R, *x]``.
        kernel: one of `pyro_recursive.mapa.kernels`, or any function
            ``(query [Q, *x], reference [R, *x]) -> [Q, R]`` of log-weights in nats. A function is
            called with blocks of both, and must treat each pair independently.
        k: from 1 to R.
        own: query and reference are the same rows.
        backend: ``"exact"``; ``"faiss"``, approximate and faster for very many references, for
            inner-product kernels; ``"auto"``: exact up to 60,000 references, faiss above where it
            is installed and the kernel allows it.
        budget: bytes of one block of scores. Inner-product kernels take about 12 bytes more (16
            with faiss) for each feature of the references.
        progress: show a bar, on terminals, in runs of more than two seconds.

    Raises:
        ImportError: faiss is not installed.
        ValueError: the data do not suit the kernel; the kernel returns nan or +inf, or -inf for
            all references of a query; k or shapes are wrong; faiss cannot serve the kernel.

    >>> from pyro_recursive.mapa.kernels import Gaussian
    >>> x = torch.tensor([[0.0], [1.0], [5.0], [5.5]])
    >>> nearest(x, x, Gaussian(1.0), k=2, own=True).index
    tensor([[0, 1],
            [1, 0],
            [2, 3],
            [3, 2]])
    """
    return Finder(kernel, reference, backend, budget)(query, k, own=own, progress=progress)


class _Search(Protocol):
    def block_size(self, k: int) -> int:
        """Return how many queries to search at once."""

    def __call__(self, query: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Return columns and scores of the best, ``[B, k]`` both, best first."""


class Finder:
    """A search prepared once for a kernel and a reference; see `nearest` for the arguments."""

    def __init__(
        self, kernel: LogKernel, reference: Tensor, backend: str = "auto", budget: int = BUDGET
    ) -> None:
        if budget < 1:
            raise ValueError(f"budget must be a positive number of bytes, got {budget}")
        _check(kernel, reference)
        self.kernel, self.reference = kernel, reference
        self.backend = backend_for(kernel, reference, backend)
        self._search: _Search
        if isinstance(kernel, InnerProductKernel) and _has_short_features(kernel, reference):
            self._search = _ProductSearch(kernel, reference, budget, self.backend == "faiss")
        else:
            self._search = _PairwiseSearch(kernel, reference, budget)

    @torch.no_grad()
    def __call__(
        self, query: Tensor, k: int, *, own: bool = False, progress: bool = True
    ) -> Neighbours:
        """Return the neighbours of queries ``[Q, *x]``."""
        self._check_query(query, k, own)
        size = self._search.block_size(k)
        blocks = []
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
                blocks.append(self._of_block(block, start, own, k))
                bar.update(len(block))
        return Neighbours(*map(torch.cat, zip(*blocks, strict=True)))

    def _of_block(self, query: Tensor, start: int, own: bool, k: int) -> Neighbours:
        rows = torch.arange(start, start + len(query), device=query.device)
        index, scores = self._search(query, rows if own else None, k)
        lost = ~(scores[:, 0] > -math.inf)  # nan too
        if lost.any():
            row = int(lost.nonzero()[0])
            raise ValueError(
                f"log k is {float(scores[row, 0])} between row {row + start} and all references: "
                "give a kernel with wider tails"
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
                f"{list(self.reference.shape[1:])}"
            )
        if not 1 <= k <= number:
            raise ValueError(f"k must be from 1 to the {number} references, got {k}")
        if own and len(query) != number:
            raise ValueError(
                f"own=True needs as many queries as references; there are {len(query)} and {number}"
            )


def backend_for(kernel: LogKernel, reference: Tensor, backend: str) -> str:
    """Return ``"exact"`` or ``"faiss"``; raise ValueError where faiss cannot serve the kernel."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    suits = _has_short_features(kernel, reference)
    if backend == "faiss" and not suits:
        raise ValueError(
            f"faiss needs an inner-product kernel of at most {_MOST_FEATURES} features, and "
            f"{kernel!r} is none: give backend='exact'"
        )
    if backend != "auto":
        return backend
    if not suits or len(reference) <= EXACT_ROWS:
        return "exact"
    if find_spec("faiss") is not None:
        return "faiss"
    warnings.warn(
        f"an exact search of {len(reference)} references takes time that grows with their square; "
        "pip install 'pyro_recursive[neighbours]' brings faiss, and backend='exact' hides this",
        stacklevel=3,
    )
    return "exact"


def _has_short_features(kernel: LogKernel, reference: Tensor) -> bool:
    return isinstance(kernel, InnerProductKernel) and kernel.width(reference) <= _MOST_FEATURES


def _check(kernel: LogKernel, data: Tensor) -> None:
    if isinstance(kernel, Kernel):
        kernel.check(data)
    elif data.is_floating_point():
        check_data(kernel, data)


def best_of_all(scores: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return columns and scores of the k best of all ``[B, R]``, ``[B, k]`` both, best first."""
    best = scores.topk(k, dim=1)
    # topk may choose any of the columns that tie for the last place: choose those rows again.
    tied = ((scores >= best.values[:, -1:]).sum(1) > k).nonzero()[:, 0]
    if len(tied):
        some, least = scores[tied], best.values[tied, -1:]
        chosen, equal = some > least, some == least
        if own is not None:
            mine = equal & (torch.arange(scores.shape[1], device=own.device) == own[tied, None])
            chosen, equal = chosen | mine, equal & ~mine
        chosen |= equal & (equal.cumsum(1) <= k - chosen.sum(1, keepdim=True))
        best.indices[tied] = chosen.nonzero()[:, 1].view(-1, k)
    return best_of_some(scores.gather(1, best.indices), best.indices, own, k)


def best_of_some(
    scores: Tensor, columns: Tensor, own: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Return the columns of the k best scores ``[B, C]``, and these scores, best first.

    Of equal scores that of the ``own`` column ``[B]`` is first, then the lower column.
    """
    rank = columns if own is None else columns.masked_fill(columns == own[:, None], -1)
    by_column = rank.argsort(1)
    scores, columns = scores.gather(1, by_column), columns.gather(1, by_column)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return columns.gather(1, best), scores.gather(1, best)


def rounded(scores: Tensor, reach: Tensor) -> Tensor:
    """Return scores ``[B, C]`` with about eleven decimal digits of their largest terms, ``reach``.

    Scores that differ by rounding errors alone become equal: ties do not depend on the order of
    summation.
    """
    quantum = torch.ldexp(torch.ones_like(reach), reach.frexp().exponent - _DIGITS)
    return torch.where(reach > 0, (scores / quantum).round() * quantum, scores)


class _PairwiseSearch:
    """The k best under any kernel: all scores of a block of queries."""

    def __init__(self, kernel: LogKernel, reference: Tensor, budget: int) -> None:
        self.kernel, self.reference, self.budget = kernel, reference, budget
        self.scores: Callable[[Tensor, Tensor], Tensor] = (
            kernel.scores if isinstance(kernel, Kernel) else kernel
        )

    def block_size(self, k: int) -> int:
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
                f"{self.kernel!r} returned shape {list(scores.shape)}; it must be "
                f"{[len(query), len(part)]}"
            )
        if scores.isnan().any() or (scores == math.inf).any():
            raise ValueError(f"{self.kernel!r} returned nan or +inf; log k must be below +inf")
        return scores.to(torch.float64)


class _ProductSearch:
    """The k best under an inner-product kernel: a screen proposes columns, scored in float64.

    A screen maps query features ``[B, F]`` and k to columns ``[B, C]``, where R stands for none,
    and to the rows ``[B]`` whose columns are enough. Other rows are scored against all references.
    """

    def __init__(
        self, kernel: InnerProductKernel, reference: Tensor, budget: int, by_faiss: bool
    ) -> None:
        self.kernel, self.budget, self.origin = kernel, budget, origin_of(reference)
        parts = reference.split(max(1, budget // (64 * kernel.width(reference))))
        self.rows = self.origin.new_empty(len(reference), kernel.width(reference))
        self.bias = self.origin.new_empty(len(reference))
        start = 0
        for part in parts:
            features, stop = kernel.reference_features(part, self.origin), start + len(part)
            self.rows[start:stop], self.bias[start:stop] = features.rows, features.bias
            start = stop
        self.typical = self.bias.abs().median()
        self.screen: _FloatScreen | _FaissScreen
        if by_faiss:
            sample = kernel.query_features(reference[:_SAMPLE], self.origin).rows
            self.screen = _FaissScreen(self.rows, self.bias, sample)
        else:
            self.screen = _FloatScreen(self.rows, self.bias)

    def block_size(self, k: int) -> int:
        return max(1, self.budget // (8 * len(self.rows) + 64 * k))

    def __call__(self, query: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        features = self.kernel.query_features(query, self.origin)
        columns, enough = self.screen(features.rows, k)
        index = columns.new_empty(len(query), k)
        scores = features.bias.new_empty(len(query), k)
        row_bytes = 8 * max(1, columns.shape[1]) * self.rows.shape[1]
        for rows in _blocks(enough, min(self.budget, _CHUNK_BYTES) // row_bytes):
            mine = None if own is None else own[rows]
            some = self._of_some(features.rows[rows], columns[rows])
            index[rows], scores[rows] = best_of_some(some, columns[rows], mine, k)
        for rows in _blocks(~enough, self.budget // (64 * len(self.rows))):
            mine = None if own is None else own[rows]
            index[rows], scores[rows] = best_of_all(self._of_all(features.rows[rows]), mine, k)
        return index, scores + features.bias[:, None]

    def _of_all(self, query: Tensor) -> Tensor:
        scores = torch.addmm(self.bias, query, self.rows.T)
        return self._rounded(scores, scores.argmax(1), query)

    def _of_some(self, query: Tensor, columns: Tensor) -> Tensor:
        safe = columns.clamp(max=len(self.rows) - 1)
        scores = torch.bmm(self.rows[safe], query[..., None]).squeeze(-1) + self.bias[safe]
        scores = scores.masked_fill(columns >= len(self.rows), -torch.inf)
        best = safe.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
        return self._rounded(scores, best, query)

    def _rounded(self, scores: Tensor, best: Tensor, query: Tensor) -> Tensor:
        reach = query.norm(dim=1) * self.rows[best].norm(dim=1) + self.bias[best].abs()
        return rounded(scores, reach.maximum(self.typical)[:, None])


def _blocks(chosen: Tensor, size: int) -> list[Tensor]:
    """Return the indices of chosen rows, at most ``size`` at a time."""
    rows = chosen.nonzero()[:, 0]
    return list(rows.split(max(1, size))) if len(rows) else []


class _FloatScreen:
    """Proposes the best by float32 products; exact, since their rounding error is bounded.

    A sum of F products has an error of at most F + 2 roundoffs of ``|q| |r|``, whatever the order
    of summation (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). The
    proposals of a row hold its k best if the last is below the k-th by more than two errors.
    """

    def __init__(self, rows: Tensor, bias: Tensor) -> None:
        self.rows, self.bias = rows.float(), bias.float()
        self.longest = float(rows.norm(dim=1).max())
        self.largest = float(bias.abs().max())

    def __call__(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        reach, number = query.norm(dim=1) * self.longest, k + max(16, k // 8)
        fits = float(reach.max()) + self.longest + self.largest < _HUGE
        if number > len(self.rows) // 16 or not fits:  # a product of all is as quick, or needed
            enough = torch.zeros_like(reach, dtype=torch.bool)
            return enough.new_empty(len(query), 0, dtype=torch.int64), enough
        unit, width = _ROUNDOFF[torch.get_float32_matmul_precision()], query.shape[1]
        error = unit * ((width + 10) * reach + 10 * self.largest)
        error += _TINY * width * (1 + self.longest + query.abs().amax(1))
        best = torch.addmm(self.bias, query.float(), self.rows.T).topk(number, dim=1)
        return best.indices, best.values[:, k - 1] - best.values[:, -1] > 2 * error


class _FaissScreen:
    """Proposes the nearest of an inverted file of Euclidean distances (faiss' ``IndexIVFFlat``).

    One more dimension turns inner products with biases into distances: for
    ``r' = (r, sqrt(c - |r| ** 2 - 2 b))`` and ``q' = (q, 0)``, the score ``q r + b`` is a constant
    of q minus ``|q' - r'| ** 2 / 2``. Features are first scaled to be as long on both sides.

    About the square root of the cells is searched for each query, so that neighbours can be missed:
    1% of the 64 nearest among MNIST's 60,000 images. Where these cells hold too few, all are.
    """

    def __init__(self, rows: Tensor, bias: Tensor, sample: Tensor) -> None:
        faiss = _faiss()
        self.number, width = rows.shape
        means = [float(side.norm(dim=1).mean()) for side in (sample, rows[: len(sample)])]
        self.scale = math.sqrt(means[0] / means[1]) if min(means) > 0 else 1.0
        points = torch.empty(self.number, width + 1, dtype=torch.float32)
        for out, part in zip(points.split(4096), rows.split(4096), strict=True):
            out[:, :-1] = part * self.scale
        missing = -(rows.norm(dim=1).square() * self.scale**2) - 2 * bias
        points[:, -1] = (missing - missing.min()).sqrt()
        # 39 points a cell: what faiss asks for, to train its k-means.
        self.cells = max(1, min(int(4 * math.sqrt(self.number)), self.number // 39))
        self.index: Any = faiss.IndexIVFFlat(faiss.IndexFlatL2(width + 1), width + 1, self.cells)
        self.index.train(points.numpy())
        self.index.add(points.numpy())

    def __call__(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        asked = torch.nn.functional.pad(query / self.scale, (0, 1)).to("cpu", torch.float32).numpy()
        number = min(self.number, k + max(8, k // 8))  # float32 may swap some
        columns = self._search(asked, number, math.isqrt(self.cells) + 1)
        short = (columns[:, :k] < 0).any(1)
        if short.any():
            columns[short] = self._search(asked[short.numpy()], number, self.cells)
        columns = torch.where(columns < 0, self.number, columns).to(query.device)
        return columns, torch.ones_like(columns[:, 0], dtype=torch.bool)

    def _search(self, asked: Any, number: int, cells: int) -> Tensor:
        self.index.nprobe = cells
        return torch.from_numpy(self.index.search(asked, number)[1])


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "backend='faiss' needs faiss: pip install 'pyro_recursive[neighbours]'"
        ) from error
    return faiss
