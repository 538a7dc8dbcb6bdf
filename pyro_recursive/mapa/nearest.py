"""The k nearest data under a kernel, exactly, in blocks of bounded memory."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_recursive.mapa.kernel_base import (
    InnerProductKernel,
    Kernel,
    LogKernel,
    check_shapes,
    origin_of,
)

BUDGET = 2**27  # bytes of one block
_DIGITS = 38  # binary digits that survive the rounding of scores


class Neighbours(NamedTuple):
    """Reference indices ``[Q, k]``, int64, and their log k in nats, float64, best first."""

    index: Tensor  # type: ignore[assignment]
    log_k: Tensor


class Search:
    """Finds the references ``[R, *x]`` with the largest log k for any queries.

    Ties go to the query's own index, if queries are the references, then to the lower index. Log k
    are rounded to about eleven digits of their largest terms, so that ties are the same on every
    machine. A kernel that is no inner product is called with blocks of both sides.
    """

    def __init__(self, kernel: LogKernel, reference: Tensor, budget: int = BUDGET) -> None:
        if isinstance(kernel, Kernel):
            kernel.check(reference)
        self.kernel, self.reference, self.budget = kernel, reference, budget
        if isinstance(kernel, InnerProductKernel):
            self.origin = origin_of(reference)
            parts = [kernel.reference_features(x, self.origin) for x in reference.split(4096)]
            self.rows, self.bias = map(torch.cat, zip(*parts, strict=True))
            self.typical = self.bias.abs().median()

    @torch.no_grad()
    def __call__(self, query: Tensor, k: int, own: bool = False) -> Neighbours:
        """Return the k nearest of queries ``[Q, *x]``; with ``own`` they are the references."""
        if isinstance(self.kernel, Kernel):
            self.kernel.check(query)
        check_shapes(query, self.reference)
        is_product = isinstance(self.kernel, InnerProductKernel)
        score = self._by_products if is_product else self._by_pairs
        blocks, start = [], 0
        for block in query.split(max(1, self.budget // (64 * len(self.reference)))):
            block = block.to(self.reference.device)
            rows = torch.arange(start, start + len(block), device=block.device)
            scores, shift = score(block)
            index, best = best_of_all(scores, rows if own else None, k)
            blocks.append((index, best + shift))
            start += len(block)
        index, log_k = map(torch.cat, zip(*blocks, strict=True))
        lost = ~(log_k[:, 0] > -math.inf)  # nan too
        if lost.any():
            row = int(lost.nonzero()[0])
            raise ValueError(f"Log k is -inf or nan between row {row} and all references.")
        if isinstance(self.kernel, Kernel):
            log_k = self.kernel.rescaled(log_k, math.prod(query.shape[1:]))
        return Neighbours(index, log_k)

    def _by_products(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return rounded scores ``[B, R]``, and what is to be added to each row ``[B, 1]``."""
        rows, bias = self.kernel.query_features(query, self.origin)  # type: ignore[attr-defined]
        scores = torch.addmm(self.bias, rows, self.rows.T)
        best = scores.argmax(1)
        reach = rows.norm(dim=1) * self.rows[best].norm(dim=1) + self.bias[best].abs()
        return _rounded(scores, reach.maximum(self.typical)[:, None]), bias[:, None]

    def _by_pairs(self, query: Tensor) -> tuple[Tensor, float]:
        score = self.kernel.scores if isinstance(self.kernel, Kernel) else self.kernel
        per_pair = 8 * math.prod(query.shape[1:])  # should the kernel take all differences
        parts = self.reference.split(max(1, self.budget // (len(query) * per_pair)))
        scores = torch.cat([score(query, part) for part in parts], 1).double()
        if scores.shape != (len(query), len(self.reference)):
            raise ValueError(f"{self.kernel!r} returned shape {list(scores.shape)}, not [Q, R].")
        if scores.isnan().any() or (scores == math.inf).any():
            raise ValueError(f"{self.kernel!r} returned nan or +inf.")
        return _rounded(scores, scores.abs().masked_fill(scores.isinf(), 0)), 0.0


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
    return in_order(scores.gather(1, best.indices), best.indices, own)


def in_order(scores: Tensor, columns: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sort columns ``[B, k]`` by their scores, best first.

    Of equal scores that of the ``own`` column ``[B]`` is first, then the lower column.
    """
    rank = columns if own is None else columns.masked_fill(columns == own[:, None], -1)
    by_column = rank.argsort(1)
    scores, columns = scores.gather(1, by_column), columns.gather(1, by_column)
    best = scores.argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, best), scores.gather(1, best)


def _rounded(scores: Tensor, reach: Tensor) -> Tensor:
    """Round scores ``[B, R]``: ties must not depend on the order of summation of ``reach``."""
    quantum = torch.ldexp(torch.ones_like(reach), reach.frexp().exponent - _DIGITS)
    return torch.where(reach > 0, (scores / quantum).round() * quantum, scores)
