"""The codes to decode for a minibatch, and their log-weights: pure torch.

The likelihood of row n under the empirical prior is a sum over M codes,
``p(x_n) = sum_i w_i p(x_n | z_i)``. Given a proposal q(i | n) on k of them, some terms are summed
exactly and the rest is estimated without bias, so that the logarithm of

    sum_j exp(log_weights[n, j]) w_{codes[j]} p(x_n | z_{codes[j]})

is a lower bound of log p(x_n) in expectation. The log-weights are 0 for summed terms and minus the
logarithm of the expected number of draws for drawn ones; they have no gradient.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SHARES = ("pooled", "shared", "pair")


class Candidates(NamedTuple):
    """Component indices to decode and their log-weights in nats, float64.

    Shared by all rows, ``codes`` are ``[U]``, all different, and ``log_weights`` ``[B, U]``, -inf
    where a row does not use a code. For each row, both are ``[B, K]``.
    """

    codes: Tensor
    log_weights: Tensor


@dataclass(frozen=True)
class Plan:
    """How the codes of a minibatch are chosen: the ``top`` of each row, and ``samples`` draws.

    ``share`` is one of:

    - ``"pair"``: row n has its own ``top + samples`` codes, drawn from q~, the rest of q(i | n).
    - ``"shared"``: the same weights, and each code is listed once.
    - ``"pooled"``: all rows use the tops and draws of all rows. Draws are from the mixture of the
      rows' q~ (without all tops), which gives their weights (the balance heuristic).

    Draws are systematic, without replacement, with inclusion probabilities in proportion to q~ (or
    to the mixture); if no more codes are left than draws, all are summed. With ``replace`` draws
    are independent, as in the paper. In a pool without replacement ``samples`` may be a fraction,
    rounded up over all rows.

    """

    top: int
    samples: float
    share: str = "pooled"
    replace: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        top, samples = self.top, self.samples
        if self.share not in SHARES:
            raise ValueError(f"share must be one of {SHARES}, got {self.share!r}.")
        if top < 0 or samples < 0 or top + samples == 0:
            raise ValueError(f"top and samples must not be negative or both 0, got {top, samples}.")
        if int(samples) != samples and (self.share != "pooled" or self.replace):
            raise ValueError(f"samples={samples} needs a pool, without replacement.")

    def __call__(self, index: Tensor, log_q: Tensor, num_components: int) -> Candidates:
        """Choose codes by a proposal ``log_q`` on components ``index``, ``[B, k]`` both.

        Each row is in descending order and normalised, in nats.
        """
        top, log_q = min(self.top, index.shape[-1]), log_q.double()
        if self.share == "pooled":
            return _pooled(index, log_q, num_components, top, self.samples, self.replace)
        own = _own(index, log_q, top, int(self.samples), self.replace)
        return own if self.share == "pair" else _unique(own)


def _own(index: Tensor, log_q: Tensor, top: int, samples: int, replace: bool) -> Candidates:
    rest = _normalised(log_q[:, top:])
    samples = samples if replace else min(samples, rest.shape[-1])
    exact = log_q[:, :top]
    exact = exact.new_zeros(exact.shape).masked_fill(exact.isneginf(), -math.inf)
    if samples == 0 or rest.shape[-1] == 0:
        return Candidates(index[:, :top], exact)
    position, log_weights = (_replaced if replace else _without)(rest, samples)
    drawn = index[:, top:].gather(1, position)
    return Candidates(torch.cat([index[:, :top], drawn], 1), torch.cat([exact, log_weights], 1))


def _replaced(rest: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Draw positions of each row independently, with weights ``1 / (S q~)``."""
    empty = rest.isneginf().all(-1, keepdim=True)
    position = torch.multinomial(rest.exp().masked_fill(empty, 1.0), samples, replacement=True)
    log_weights = -rest.gather(1, position) - math.log(samples)
    return position, log_weights.masked_fill(empty, -math.inf)


def _without(rest: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Draw different positions of each row, with weights of one over the inclusion probability."""
    chances = inclusion(rest.exp(), samples)
    order = torch.rand_like(chances).argsort(-1)
    chosen = systematic(chances, order, torch.rand_like(chances[:, :1]))
    # The chosen ones first, in any order; rows with fewer have positions left over.
    position = chosen.to(torch.uint8).topk(samples, -1).indices
    log_weights = -chances.gather(1, position).log()
    return position, log_weights.masked_fill(~chosen.gather(1, position), -math.inf)


def _pooled(
    index: Tensor, log_q: Tensor, num_components: int, top: int, samples: float, replace: bool
) -> Candidates:
    rows = len(index)
    in_top = torch.zeros(num_components, dtype=torch.bool, device=index.device)
    in_top[index[:, :top][~log_q[:, :top].isneginf()]] = True
    exact = in_top.nonzero()[:, 0]
    rest = _normalised(log_q.masked_fill(in_top[index], -math.inf))
    total = rest.new_zeros(num_components).index_add(0, index.flatten(), rest.exp().flatten())
    draw = _pool_replaced if replace else _pool_without
    drawn, log_weights = draw(index, rest, total, samples)
    log_weights = torch.cat([log_weights.new_zeros(len(exact)), log_weights])
    return Candidates(torch.cat([exact, drawn]), log_weights.expand(rows, -1))


def _pool_replaced(
    index: Tensor, rest: Tensor, total: Tensor, samples: float
) -> tuple[Tensor, Tensor]:
    """Draw from each row independently; equal draws are merged, their weights added."""
    if samples == 0:
        return index.new_empty(0), rest.new_empty(0)
    position, log_weights = _replaced(rest, int(samples))
    drawn = index.gather(1, position)[~log_weights.isneginf()]
    codes, counts = drawn.unique(return_counts=True)
    return codes, counts.log() - math.log(samples) - total[codes].log()


def _pool_without(
    index: Tensor, rest: Tensor, total: Tensor, samples: float
) -> tuple[Tensor, Tensor]:
    """Draw different codes from the mixture, as many as the rows would draw together."""
    codes = total.nonzero()[:, 0]
    number = math.ceil(samples * int((~rest.isneginf().all(-1)).sum()) - 1e-9)
    chances = inclusion(total[codes][None], number)
    order = _by_owner(index, rest, codes, len(total))
    chosen = systematic(chances, order, torch.rand_like(chances[:, :1]))[0]
    return codes[chosen], -chances[0, chosen].log()


def _by_owner(index: Tensor, rest: Tensor, codes: Tensor, num_components: int) -> Tensor:
    """Return a random order ``[1, n]`` in which codes nearest to the same row are adjacent."""
    best = rest.new_full((num_components,), -math.inf)
    best = best.scatter_reduce(0, index.flatten(), rest.flatten(), "amax")
    owner = torch.zeros(num_components, dtype=torch.long, device=index.device)
    row, position = ((rest == best[index]) & ~rest.isneginf()).nonzero(as_tuple=True)
    owner[index[row, position]] = row
    rank = torch.randperm(len(index), device=index.device)
    return (rank[owner[codes]] + torch.rand_like(best[codes])).argsort()[None]


def inclusion(weights: Tensor, number: int) -> Tensor:
    """Return inclusion probabilities in proportion to ``weights``, at most 1, ``[R, k]``.

    Each row sums to ``number``, or to the number of its positive weights, if that is less.
    """
    if not weights.shape[-1]:
        return weights
    ordered, order = weights.sort(-1, descending=True)
    size = (ordered > 0).sum(-1, keepdim=True).clamp(max=number)
    position = torch.arange(ordered.shape[-1], device=weights.device)
    tail = ordered.flip(-1).cumsum(-1).flip(-1)  # from small to large, for precision
    left = size - position
    fits = (ordered * left <= tail) | (left <= 0)
    certain = fits.int().argmax(-1, keepdim=True)  # the first position from which all fit
    certain = torch.where(fits.any(-1, keepdim=True), certain, size)
    slack = tail.gather(-1, certain.clamp(max=tail.shape[-1] - 1))
    factor = torch.where(certain < size, (size - certain) / slack, 0.0)
    chances = torch.where(position < certain, 1.0, ordered * factor).clamp(max=1.0)
    return torch.empty_like(chances).scatter(-1, order, chances)


def systematic(chances: Tensor, order: Tensor, start: Tensor) -> Tensor:
    """Choose positions with given inclusion probabilities: ``[R, k]`` to bool ``[R, k]``.

    Laid out on a line in ``order`` ``[R, k]``, each as long as its probability, those are chosen
    that contain one of the points ``start, start + 1, ...``; ``start`` ``[R, 1]`` is uniform on
    [0, 1). A row whose probabilities sum to a whole number has exactly that many (Madow 1949).
    """
    ends = chances.gather(-1, order).cumsum(-1)
    whole = ends[..., -1:].round()
    # The total is whole, whatever the rounding of the sums before.
    ends = torch.cat([torch.minimum(ends[..., :-1], whole), whole], -1)
    counts = (ends - start).ceil().clamp(min=0)
    chosen = counts.diff(dim=-1, prepend=torch.zeros_like(whole)) > 0
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def _unique(own: Candidates) -> Candidates:
    codes, position = own.codes.unique(return_inverse=True)
    log_weights = own.log_weights.new_full((len(own.codes), len(codes)), -math.inf)
    # A row may have drawn a code several times: its weights add.
    highest = log_weights.scatter_reduce(1, position, own.log_weights, "amax")
    safe = highest.masked_fill(highest.isneginf(), 0.0)
    parts = (own.log_weights - safe.gather(1, position)).exp()
    return Candidates(codes, torch.zeros_like(safe).scatter_add(1, position, parts).log() + safe)


def _normalised(log_q: Tensor) -> Tensor:
    """Return normalised rows; rows of -inf stay."""
    if not log_q.shape[-1]:
        return log_q
    total = log_q.logsumexp(-1, keepdim=True)
    return torch.where(total.isneginf(), log_q, log_q - total)
