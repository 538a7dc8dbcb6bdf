"""Ranks of true values among posterior draws, and whether they are uniform.

The rank of a true value is the number of L draws from its posterior that are below it, 0 to L. Over
data sets simulated from the model it is uniform for the exact posterior, in each dimension. Ranks
at both ends belong to posteriors that are too narrow, ranks in the middle to those too wide, and a
slope to those too low or too high.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.special import bdtr, bdtrc, bdtrik, chdtrc
from torch import Tensor

from pyro_recursive.evaluation.calls import shown_as_html

ORDERS = 4  # of the polynomials of the test: location, width, skewness, tails
SIMULATIONS = 2000  # of the band
FEWEST = 20  # data sets, for the large-sample distribution of the test


def ranks_of(truth: Tensor, draws: Tensor) -> Tensor:
    """Return the ranks of values ``[*any]`` among ``[L, *any]``; ties are broken at random."""
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    share = torch.rand(equal.shape, dtype=torch.float64, device=equal.device)
    return below + (share * (equal + 1)).long().clamp_max(equal)


def uniformity(ranks: Tensor, num_draws: int) -> Tensor:
    """Return the p-value of Neyman's smooth test of uniform ranks, float64 ``[dims]``.

        sum_k (N ** -0.5 sum_i h_k(rank_i)) ** 2  ~  chi-square with 4 degrees of freedom

    for the polynomials h_k of degrees 1 to 4 that are orthonormal over the ranks 0 to L
    (Legendre's, for large L): they detect a shift, a wrong width, a skew and wrong tails. ``ranks``
    are integers ``[N, dims]``, ``num_draws`` is L.

    Raises:
        ValueError: fewer than 20 ranks; ranks below 0 or above L.

    Reference: 'Smooth Test for Goodness of Fit' (Neyman, 1937).

    >>> uniformity(torch.arange(100).unsqueeze(1), num_draws=99)
    tensor([1.], dtype=torch.float64)
    """
    if len(ranks) < FEWEST:
        raise ValueError(f"The test needs {FEWEST} ranks, got {len(ranks)}.")
    _check_range(ranks, num_draws)
    possible = torch.linspace(-1, 1, num_draws + 1, dtype=torch.float64)
    powers = torch.stack([possible**k for k in range(min(ORDERS, num_draws) + 1)], 1)
    polynomials = torch.linalg.qr(powers).Q[:, 1:] * (num_draws + 1) ** 0.5
    means = polynomials.to(ranks.device)[ranks].mean(0)
    statistic = len(ranks) * means.square().sum(-1)
    return torch.from_numpy(chdtrc(means.shape[-1], statistic.cpu().numpy())).to(ranks.device)


def ecdf_difference(ranks: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    """Return the empirical distribution function of ranks ``[N, dims]`` minus the uniform one.

    At the positions k / (L + 1) for k = 1 .. L, ``[L]``, the share of ranks below k minus the
    position, ``[L, dims]``.

    Reference: 'Graphical Test for Discrete Uniformity' (Säilynoja et al., arXiv 2103.10522).

    >>> ecdf_difference(torch.tensor([[0], [0], [1], [1]]), num_draws=3)[1].T
    tensor([[0.2500, 0.5000, 0.2500]], dtype=torch.float64)
    """
    _check_range(ranks, num_draws)
    position = torch.arange(1, num_draws + 1, device=ranks.device)
    ordered = ranks.T.sort(-1).values.contiguous()
    below = torch.searchsorted(ordered, position.repeat(len(ordered), 1))
    at = position.double() / (num_draws + 1)
    return at, below.T.double() / len(ranks) - at.unsqueeze(1)


def ecdf_band(num_ranks: int, num_draws: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return the band, ``[L]`` twice, that contains `ecdf_difference` of N uniform ranks.

    Binomial intervals, as wide as 2,000 simulations need them to contain one whole curve with
    probability ``level``. The simulations have a fixed seed of their own.

    >>> lower, upper = ecdf_band(100, 9)
    >>> bool((lower < 0).all() and (upper > 0).all() and (upper < 0.2).all())
    True
    """
    shares = np.full(num_draws + 1, 1 / (num_draws + 1))
    simulated = np.random.default_rng(0).multinomial(num_ranks, shares, SIMULATIONS)
    below, at = simulated.cumsum(1)[:, :-1], np.arange(1, num_draws + 1) / (num_draws + 1)
    tails = np.minimum(bdtr(below, num_ranks, at), bdtrc(below - 1, num_ranks, at)).min(1)
    limits = binomial_interval(num_ranks, at, float(np.quantile(tails, 1 - level)))
    lower, upper = (torch.from_numpy(limit / num_ranks - at) for limit in limits)
    return lower, upper


def binomial_interval(
    number: int, shares: np.ndarray, tail: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the limits ``[k]`` of binomial counts with a probability in each tail."""
    return _binomial_quantile(tail, number, shares), _binomial_quantile(1 - tail, number, shares)


def _binomial_quantile(probability: float, number: int, shares: np.ndarray) -> np.ndarray:
    """Return the smallest counts that are not exceeded with at least a probability."""
    count = np.ceil(bdtrik(probability, number, shares))
    before = np.maximum(count - 1, 0)  # the inverse is right up to rounding
    return np.where(bdtr(before, number, shares) >= probability, before, count)


def _check_range(ranks: Tensor, num_draws: int) -> None:
    low, high = int(ranks.min()), int(ranks.max())
    if low < 0 or high > num_draws:
        raise ValueError(f"Ranks are 0 to {num_draws}, got {low} to {high}.")


@dataclass(frozen=True)
class Calibration:
    """The ranks of true latents among L draws of a guide, and tests of whether they are uniform.

    ``ranks`` are integers ``[N, dims]`` for each site, 0 to L: of N simulated data sets, in each of
    a site's numbers (plates inside a data set and event dims, flattened). ``num_draws`` is L.

    Raises:
        ValueError: no sites; and as `uniformity`.

    >>> print(Calibration({"z": torch.arange(100).unsqueeze(1) // 2}, num_draws=99))
    z: smallest adjusted p-value 9.5e-18, of 1 numbers
    """

    ranks: dict[str, Tensor]
    num_draws: int

    def __post_init__(self) -> None:
        if not self.p_values:
            raise ValueError("There are no ranks: no latent site was ranked.")

    @cached_property
    def p_values(self) -> dict[str, Tensor]:
        """The p-values ``[dims]`` of each site, each for one number alone."""
        return {name: uniformity(own, self.num_draws) for name, own in self.ranks.items()}

    @property
    def adjusted(self) -> dict[str, Tensor]:
        """The p-values times the number of all tests, at most 1 (Bonferroni)."""
        number = sum(len(p) for p in self.p_values.values())
        return {name: (number * p).clamp_max(1) for name, p in self.p_values.items()}

    def is_calibrated(self, level: float = 0.01) -> bool:
        """Whether no adjusted p-value is below the level.

        No proof: more data sets may find a fault, and ranks average over the prior.
        """
        return all(bool((p >= level).all()) for p in self.adjusted.values())

    _repr_html_ = shown_as_html

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: smallest adjusted p-value {p.min().item():.2g}, of {len(p)} numbers"
            for name, p in self.adjusted.items()
        )
