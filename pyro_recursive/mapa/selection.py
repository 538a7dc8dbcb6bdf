"""The k best of each row of scores, exactly and in one order: pure torch."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["LARGEST_GROUP", "candidates", "ordered"]

LARGEST_GROUP = 32
_GROUPS = 16  # at least so many groups per neighbour: then few of the best share one


def candidates(
    scores: Tensor, k: int, slack: Tensor | None = None, widest: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return columns ``[B, C]`` that hold the k best scores of each row ``[B, R]``, ties included.

    All columns that come within ``slack`` ``[B]`` of the k-th best are among them. Rows with fewer
    columns than others are filled up with numbers from R on, which are no columns.

    A row is read once, for the maxima of groups of columns; the k-th best of these is below the
    k-th best score, by little where groups are many times k. Then few groups are left to look into.
    Groups take columns from all over the row, as rows of data in order are often alike.

    The second tensor ``[B]`` is true for rows with more than ``widest`` columns, which are left
    out.
    """
    grouped = _grouped(scores, k)
    maxima = grouped.amax(1)
    least = maxima.topk(k, dim=1, sorted=False).values.amin(1)
    if slack is not None:
        least = least - slack
    hit = maxima >= least[:, None]
    wide = least.new_zeros(len(least), dtype=torch.bool)
    if widest is not None:  # before the groups are looked into, which would take memory
        wide = hit.sum(1) > widest
        hit &= ~wide[:, None]
    rows, groups = hit.nonzero(as_tuple=True)
    members = torch.arange(grouped.shape[1], device=rows.device)
    columns = groups[:, None] + members * maxima.shape[1]
    good = grouped[rows[:, None], members, groups[:, None]] >= least[rows, None]
    rows, columns = rows[:, None].expand_as(columns)[good], columns[good]
    if widest is not None:
        wide |= rows.bincount(minlength=len(wide)) > widest
        rows, columns = rows[~wide[rows]], columns[~wide[rows]]
    return _padded(rows, columns, scores.shape), wide


def ordered(scores: Tensor, columns: Tensor, own: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return the columns of the k best scores ``[B, C]``, and these scores, both ``[B, k]``.

    Best first. Of equal scores that of the ``own`` column ``[B]`` is first, then the lower column.
    """
    rank = columns if own is None else columns.masked_fill(columns == own[:, None], -1)
    by_column = rank.argsort(1)
    scores, columns = scores.gather(1, by_column), columns.gather(1, by_column)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return columns.gather(1, best), scores.gather(1, best)


def _grouped(scores: Tensor, k: int) -> Tensor:
    """Return scores as ``[B, members, groups]``, filled up with -inf."""
    most = min(LARGEST_GROUP, scores.shape[1] // (_GROUPS * k))
    # A power of two, so that rows of a multiple of the largest need no filling.
    size = 2 ** (most.bit_length() - 1) if most else 1
    missing = -scores.shape[1] % size
    whole = pad(scores, (0, missing), value=-math.inf) if missing else scores  # a copy even of 0
    return whole.unflatten(1, (size, -1))


def _padded(rows: Tensor, columns: Tensor, shape: torch.Size) -> Tensor:
    """Return columns, given with their rows in order, as a matrix."""
    counts = rows.bincount(minlength=shape[0])
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(rows), device=rows.device) - starts[rows]
    found = columns.new_full((shape[0], int(counts.max())), shape[1])
    found[rows, places] = columns
    return found
