"""Ranks of true values among posterior draws, and whether they are uniform.

The rank of a true value is the number of L draws from its posterior that are below it, 0 to L. Over
data sets simulated from the model it is uniform for the exact posterior, in each dimension. Ranks
at both ends belong to posteriors that are too narrow, ranks in the middle to those too wide, and a
slope to those too low or too high.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import bdtr, bdtrc, bdtrik
from torch import Tensor

MOST_BINS, PER_BIN = 20, 10  # of the histogram, and the ranks expected in each
SIMULATIONS = 2000  # of the band
FEWEST = 20  # data sets, for the large-sample distributions of the tests
CLEAR = 3  # standard errors that a fault must have to be named


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
        """Count draws, ``[s, *any]``."""
        self.below = self.below + (draws < self.truth).sum(0)
        self.equal = self.equal + (draws == self.truth).sum(0)

    @cached_property
    def ranks(self) -> Tensor:
        """The ranks, integers ``[*any]``."""
        share = torch.rand(self.equal.shape, dtype=torch.float64, device=self.equal.device)
        return self.below + (share * (self.equal + 1)).long().clamp_max(self.equal)


def rank_histogram(ranks: Tensor, num_draws: int, bins: int | None = None) -> tuple[Tensor, Tensor]:
    """Count ranks ``[N, dims]`` in bins: ``[bins, dims]``, and the expected share of each bin.

    Args:
        ranks: integers, 0 to L.
        num_draws: L.
        bins: at most L + 1; None is at most 20, with about 10 ranks or more in each.

    Raises:
        ValueError: ranks are no integers between 0 and L.

    >>> counts, shares = rank_histogram(torch.tensor([[0], [1], [2], [2]]), num_draws=2, bins=3)
    >>> counts.T.tolist(), shares.tolist() == [1 / 3] * 3
    ([[1.0, 1.0, 2.0]], True)
    """
    _check_ranks(ranks, num_draws)
    bins = max(2, min(MOST_BINS, len(ranks) // PER_BIN)) if bins is None else bins
    bins = min(bins, num_draws + 1)
    possible = torch.arange(num_draws + 1, device=ranks.device) * bins // (num_draws + 1)
    shares = torch.bincount(possible, minlength=bins).double() / (num_draws + 1)
    index = ranks * bins // (num_draws + 1)
    counts = shares.new_zeros(bins, *ranks.shape[1:])
    return counts.scatter_add(0, index, torch.ones_like(index, dtype=torch.float64)), shares


def ecdf_difference(ranks: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    """Return the empirical distribution function of ranks ``[N, dims]`` minus the uniform one.

    Returns:
        The positions k / (L + 1) for k = 1 .. L, ``[L]``; and at each the share of ranks below k
        minus it, ``[L, dims]``.

    Raises:
        ValueError: ranks are no integers between 0 and L.

    Reference: 'Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit
    Evaluation and Multiple Sample Comparison' (Säilynoja et al., arXiv 2103.10522).

    >>> ecdf_difference(torch.tensor([[0], [0], [1], [1]]), num_draws=3)[1].T
    tensor([[0.2500, 0.5000, 0.2500]], dtype=torch.float64)
    """
    counts, _ = rank_histogram(ranks, num_draws, num_draws + 1)
    at = torch.arange(1, num_draws + 1, device=ranks.device).double() / (num_draws + 1)
    return at, counts.cumsum(0)[:-1] / len(ranks) - at.unsqueeze(1)


def ecdf_band(num_ranks: int, num_draws: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return the band, ``[L]`` twice, that contains `ecdf_difference` of uniform ranks.

    Binomial intervals, as wide as 2,000 simulations need them to contain one whole curve with
    probability ``level``. The simulations have a fixed seed of their own.

    Args:
        num_ranks: N.
        num_draws: L.
        level: the probability, between 0 and 1.

    Reference: as in `ecdf_difference`.

    >>> lower, upper = ecdf_band(100, 9)
    >>> bool((lower < 0).all() and (upper > 0).all() and (upper < 0.2).all())
    True
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}.")
    shares = np.full(num_draws + 1, 1 / (num_draws + 1))
    simulated = np.random.default_rng(0).multinomial(num_ranks, shares, SIMULATIONS)
    below, at = simulated.cumsum(1)[:, :-1], np.arange(1, num_draws + 1) / (num_draws + 1)
    tails = np.minimum(bdtr(below, num_ranks, at), bdtrc(below - 1, num_ranks, at)).min(1)
    tail = np.quantile(tails, 1 - level)
    limits = _binomial_quantile(tail, num_ranks, at), _binomial_quantile(1 - tail, num_ranks, at)
    lower, upper = (torch.from_numpy(limit / num_ranks - at) for limit in limits)
    return lower, upper


def binomial_interval(number: int, shares: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the limits ``[k]`` of binomial counts, each with probability ``level``.

    >>> binomial_interval(10, torch.tensor([0.5]), 0.95)
    (tensor([2.]), tensor([8.]))
    """
    at, tail = shares.double().numpy(), (1 - level) / 2
    limits = _binomial_quantile(tail, number, at), _binomial_quantile(1 - tail, number, at)
    lower, upper = (torch.from_numpy(limit).to(shares.dtype) for limit in limits)
    return lower, upper


def _binomial_quantile(probability: float, number: int, shares: np.ndarray) -> np.ndarray:
    """Return the smallest counts that are not exceeded with at least a probability."""
    count = np.ceil(bdtrik(probability, number, shares))
    before = np.maximum(count - 1, 0)  # the inverse is right up to rounding
    return np.where(bdtr(before, number, shares) >= probability, before, count)


def _check_ranks(ranks: Tensor, num_draws: int) -> None:
    if ranks.dim() != 2 or ranks.is_floating_point():
        raise ValueError(
            f"ranks must be integers [N, dims], got {ranks.dtype} {tuple(ranks.shape)}."
        )
    if ranks.numel() and not 0 <= int(ranks.min()) <= int(ranks.max()) <= num_draws:
        low, high = int(ranks.min()), int(ranks.max())
        raise ValueError(f"Ranks are 0 to {num_draws}, got {low} to {high}.")


class Uniformity(NamedTuple):
    """Tests of whether ranks are uniform, for each dimension: float64 ``[dims]``.

    ``p_value`` is three times the smallest p-value (at most 1) of three tests: chi-square of the
    histogram, with p-value ``histogram``; the mean and the spread of the ranks, with standard
    normal statistics ``location`` (above 0: draws too low) and ``spread`` (above 0: too narrow).
    """

    p_value: Tensor
    histogram: Tensor
    location: Tensor
    spread: Tensor


def uniformity(ranks: Tensor, num_draws: int) -> Uniformity:
    """Test whether ranks ``[N, dims]`` among L draws are uniform on 0 .. L, in each dimension.

    The mean and the spread detect a shift and a wrong width with about half as many ranks as the
    histogram, which detects all else.

    Raises:
        ValueError: fewer than 20 ranks; ranks below 0 or above L.

    Reference: 'Validating Bayesian Inference Algorithms with Simulation-Based Calibration' (Talts
    et al., arXiv 1804.06788).

    >>> found = uniformity(torch.arange(100).unsqueeze(1), num_draws=99)
    >>> found.histogram, bool(found.location.abs() < 1e-6)
    (tensor([1.], dtype=torch.float64), True)
    """
    if len(ranks) < FEWEST:
        raise ValueError(
            f"Uniformity needs at least {FEWEST} ranks, got {len(ranks)}. Simulate more data sets."
        )
    counts, shares = rank_histogram(ranks, num_draws)
    expected = len(ranks) * shares.unsqueeze(1)
    statistic = ((counts - expected).square() / expected).sum(0)
    freedom = torch.full_like(statistic, (len(shares) - 1) / 2)
    histogram = torch.special.gammaincc(freedom, statistic / 2)
    # Around the middle, on the scale where ranks fill (-1/2, 1/2).
    possible = (torch.arange(num_draws + 1, device=ranks.device).double() + 0.5) / (num_draws + 1)
    possible, found = possible - 0.5, (ranks.double() + 0.5) / (num_draws + 1) - 0.5
    location = _standardised(found, possible)
    spread = _standardised(found.square(), possible.square())
    normal = torch.special.erfc(torch.stack([location, spread]).abs() / math.sqrt(2))
    smallest = torch.minimum(histogram, normal.amin(0))
    return Uniformity((3 * smallest).clamp_max(1), histogram, location, spread)


def _standardised(found: Tensor, possible: Tensor) -> Tensor:
    """Return by how many standard errors means differ from that of equally likely values."""
    deviation = possible.std(correction=0)
    return (found.mean(0) - possible.mean()) / deviation * math.sqrt(len(found))


def holm(p_values: Tensor) -> Tensor:
    """Return p-values ``[k]`` adjusted for their number, after Holm."""
    ordered, order = p_values.sort()
    number = torch.arange(len(p_values), 0, -1, device=p_values.device)
    adjusted = (ordered * number).clamp_max(1).cummax(0).values
    return torch.empty_like(adjusted).scatter(0, order, adjusted)


@dataclass(frozen=True)
class Calibration:
    """The ranks of true latents among L draws of a guide, and whether they are uniform.

    Args:
        ranks: integers ``[N, dims]`` for each site, 0 to L: of N simulated data sets, in each of a
            site's numbers (plates inside a data set and event dims, flattened).
        num_draws: L.

    Raises:
        ValueError: fewer than 20 data sets, no site, or ranks out of their range.

    >>> found = Calibration({"z": torch.arange(100).unsqueeze(1) // 2}, num_draws=99)
    >>> print(found)
    Not calibrated in 1 of 1 numbers at level 0.01:
    z: the draws are too high (adjusted p-value 1.4e-17)
    """

    ranks: dict[str, Tensor]
    num_draws: int

    def __post_init__(self) -> None:
        """Test at once: ranks that cannot be tested raise here."""
        _ = self.tests

    @cached_property
    def tests(self) -> dict[str, Uniformity]:
        """The tests of each site, ``[dims]``."""
        if not self.ranks:
            raise ValueError("There are no ranks: no latent site was ranked.")
        return {name: uniformity(own, self.num_draws) for name, own in self.ranks.items()}

    @property
    def p_values(self) -> dict[str, Tensor]:
        """The p-values ``[dims]`` of each site, each for one number alone."""
        return {name: found.p_value for name, found in self.tests.items()}

    @property
    def adjusted(self) -> dict[str, Tensor]:
        """The p-values adjusted for the number of all tests (Holm)."""
        names, own = zip(*self.p_values.items(), strict=True)
        parts = holm(torch.cat(own)).split([len(p) for p in own])
        return dict(zip(names, parts, strict=True))

    def is_calibrated(self, level: float = 0.01) -> bool:
        """Whether no adjusted p-value is below the level.

        No proof: more data sets may find a fault, and ranks average over the prior.
        """
        return all(bool((p >= level).all()) for p in self.adjusted.values())

    def verdict(self, level: float = 0.01) -> str:
        """Return in words which numbers are off, and how."""
        lines = [
            f"{name}{f'[{dim}]' if len(p) > 1 else ''}: the draws are {self._fault(name, dim)} "
            f"(adjusted p-value {p[dim].item():.2g})"
            for name, p in self.adjusted.items()
            for dim in (p < level).nonzero().flatten().tolist()
        ]
        p_values = torch.cat(list(self.adjusted.values()))
        if lines:
            head = f"Not calibrated in {len(lines)} of {len(p_values)} numbers at level {level:g}:"
            return "\n".join([head, *lines])
        size = len(next(iter(self.ranks.values())))
        return (
            f"No fault found in {len(p_values)} numbers with {size} simulated data sets "
            f"(smallest adjusted p-value {p_values.min().item():.2g})."
        )

    def _fault(self, name: str, dim: int) -> str:
        """Return how ranks are off; a shift widens ranks, too: the clearer of the two."""
        found = self.tests[name]
        location, spread = found.location[dim].item(), found.spread[dim].item()
        if abs(location) > max(CLEAR, abs(spread)):
            return "too low" if location > 0 else "too high"
        if abs(spread) > CLEAR:
            return "too narrow" if spread > 0 else "too wide"
        return "of a wrong shape"

    def __str__(self) -> str:
        """Return the verdict."""
        return self.verdict()
