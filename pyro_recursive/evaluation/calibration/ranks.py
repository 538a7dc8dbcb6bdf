"""Ranks of true values among draws of their posteriors, and how these look: pure torch.

The rank of a true value is the number of L draws from its posterior that are below it, 0 to L. Over
data sets simulated from the model it is uniform for the exact posterior, in each dimension. Ranks
at both ends belong to posteriors that are too narrow, ranks in the middle to those too wide, and a
slope to those too low or too high.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

__all__ = [
    "RankSums",
    "binomial_interval",
    "check_ranks",
    "ecdf_band",
    "ecdf_difference",
    "rank_histogram",
]

MOST_BINS, PER_BIN = 20, 10  # of the histogram, and the ranks that each should get
SIMULATIONS = 2000  # of the band


class RankSums:
    """Ranks of true values ``[*any]`` among draws that come in chunks; ties are broken at random.

    >>> sums = RankSums(torch.tensor([0.5, 2.0]))
    >>> sums.add(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    >>> sums.ranks
    tensor([1, 2])
    """

    def __init__(self, truth: Tensor) -> None:
        self.truth = truth
        self.below = self.equal = torch.zeros_like(truth, dtype=torch.long)

    def add(self, draws: Tensor) -> None:
        """Take draws, ``[s, *any]``."""
        self.below = self.below + (draws < self.truth).sum(0)
        self.equal = self.equal + (draws == self.truth).sum(0)

    @cached_property
    def ranks(self) -> Tensor:
        """The ranks ``[*any]``, integers: the same in each look."""
        share = torch.rand(self.equal.shape, dtype=torch.float64, device=self.equal.device)
        return self.below + (share * (self.equal + 1)).long().clamp_max(self.equal)


def rank_histogram(ranks: Tensor, num_draws: int, bins: int | None = None) -> tuple[Tensor, Tensor]:
    """Count ranks ``[N, dims]`` in bins: ``[bins, dims]``, and the share that each should get.

    :param bins: None is at most 20, with about 10 ranks or more in each; never more than L + 1
    :raises ValueError: ranks are no integers between 0 and L

    >>> counts, shares = rank_histogram(torch.tensor([[0], [1], [2], [2]]), num_draws=2, bins=3)
    >>> counts.T.tolist(), shares.tolist() == [1 / 3] * 3
    ([[1.0, 1.0, 2.0]], True)
    """
    check_ranks(ranks, num_draws)
    bins = max(2, min(MOST_BINS, len(ranks) // PER_BIN)) if bins is None else bins
    bins = min(bins, num_draws + 1)
    every = torch.arange(num_draws + 1, device=ranks.device) * bins // (num_draws + 1)
    shares = torch.bincount(every, minlength=bins).double() / (num_draws + 1)
    place = ranks * bins // (num_draws + 1)
    counts = shares.new_zeros(bins, *ranks.shape[1:])
    return counts.scatter_add(0, place, torch.ones_like(place, dtype=torch.float64)), shares


def ecdf_difference(ranks: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    """Return the empirical distribution function of ranks minus the uniform one.

    :param ranks: ``[N, dims]``
    :return: the positions k / (L + 1) for k = 1 .. L, ``[L]``, and at each the share of ranks
        below k minus it, ``[L, dims]``
    :raises ValueError: ranks below 0 or above L

    Source: 'Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit
    Evaluation and Multiple Sample Comparison' (Säilynoja et al., arXiv 2103.10522).

    >>> ecdf_difference(torch.tensor([[0], [0], [1], [1]]), num_draws=3)[1].T
    tensor([[0.2500, 0.5000, 0.2500]], dtype=torch.float64)
    """
    counts, _ = rank_histogram(ranks, num_draws, num_draws + 1)
    at = torch.arange(1, num_draws + 1, device=ranks.device).double() / (num_draws + 1)
    return at, counts.cumsum(0)[:-1] / len(ranks) - at.unsqueeze(1)


def ecdf_band(num_ranks: int, num_draws: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return the band that holds all of `ecdf_difference` for uniform ranks, at a level.

    Intervals of binomials, as wide as 2,000 simulations need them to hold one whole difference with
    probability ``level``. The simulations have a random state of their own, the same each time.

    :param num_ranks: N
    :param num_draws: L
    :return: lower and upper limit, ``[L]`` each
    :raises ValueError: ``level`` is not between 0 and 1

    Source: as in `ecdf_difference`.

    >>> lower, upper = ecdf_band(100, 9)
    >>> bool((lower < 0).all() and (upper > 0).all() and (upper < 0.2).all())
    True
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    at = torch.arange(1, num_draws + 1, dtype=torch.float64) / (num_draws + 1)
    below = _binomial_cdf(num_ranks, at)  # [N + 2, L]: P(count < n) in row n
    counts = _uniform_counts(num_ranks, num_draws)
    tails = torch.minimum(below.gather(0, counts + 1), 1 - below.gather(0, counts))
    width = (2 * tails.amin(1)).quantile(1 - level) / 2
    lower, upper = (limit / num_ranks - at for limit in _limits(below, width))
    return lower, upper


def binomial_interval(number: int, shares: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the limits of binomial counts ``[k]`` with these shares of a number, at a level each.

    >>> binomial_interval(10, torch.tensor([0.5]), 0.95)
    (tensor([2.]), tensor([8.]))
    """
    below = _binomial_cdf(number, shares.double())
    lower, upper = _limits(below, torch.tensor((1 - level) / 2))
    return lower.to(shares.dtype), upper.to(shares.dtype)


def _limits(below: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest counts at which so much, and all but so much, is not above them."""
    return (below[1:] < tail).sum(0), (below[1:] < 1 - tail).sum(0)


def _uniform_counts(num_ranks: int, num_draws: int) -> Tensor:
    """Simulate how many of uniform ranks are below 1 .. L: ``[simulations, L]``."""
    generator = torch.Generator().manual_seed(0)
    left = torch.full((SIMULATIONS,), float(num_ranks), dtype=torch.float64)
    found = []
    for k in range(num_draws):
        share = torch.full_like(left, 1 / (num_draws + 1 - k))
        left = left - torch.binomial(left, share, generator=generator)
        found.append(num_ranks - left)
    return torch.stack(found, 1).long()


def _binomial_cdf(number: int, share: Tensor) -> Tensor:
    """Return P(count < n) for n = 0 .. number + 1 and shares ``[k]``: ``[number + 2, k]``."""
    n = torch.arange(number + 1, dtype=torch.float64).unsqueeze(1)
    ways = math.lgamma(number + 1) - torch.lgamma(n + 1) - torch.lgamma(number - n + 1)
    mass = (ways + n * share.log() + (number - n) * torch.log1p(-share)).exp()
    return torch.cat([torch.zeros_like(mass[:1]), mass.cumsum(0).clamp_max(1)])


def check_ranks(ranks: Tensor, num_draws: int) -> None:
    """Raise ValueError where ranks are no integers ``[N, dims]`` between 0 and L."""
    if ranks.dim() != 2 or ranks.is_floating_point():
        raise ValueError(
            f"ranks must be integers [N, dims], got {ranks.dtype} {tuple(ranks.shape)}."
        )
    if ranks.numel() and not 0 <= int(ranks.min()) <= int(ranks.max()) <= num_draws:
        low, high = int(ranks.min()), int(ranks.max())
        raise ValueError(
            f"Ranks among {num_draws} draws are 0 to {num_draws}, got {low} to {high}."
        )
