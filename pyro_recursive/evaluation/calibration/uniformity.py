"""Whether ranks are uniform, and how they are not."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_recursive.evaluation.calibration.ranks import rank_histogram

__all__ = ["FEWEST", "Calibration", "Uniformity", "holm", "uniformity"]

FEWEST = 20  # data sets, for the large-sample distributions of the tests
CLEAR = 3  # standard errors that a fault must have to be named


class Uniformity(NamedTuple):
    """Tests of whether ranks are uniform, for each dimension: float64 ``[dims]``.

    ``p_value`` is three times the smallest of the p-values of three tests (at most 1): of the
    histogram, chi-square, whose p-value is ``histogram``; and of the mean and of the spread of the
    ranks, whose standard normal statistics are ``location`` (above 0: the truth is above most
    draws, which are too low) and ``spread`` (above 0: too many ranks at the ends; draws that are
    too narrow).
    """

    p_value: Tensor
    histogram: Tensor
    location: Tensor
    spread: Tensor


def uniformity(ranks: Tensor, num_draws: int) -> Uniformity:
    """Test whether ranks ``[N, dims]`` among L draws are uniform on 0 .. L, in each dimension.

    :raises ValueError: fewer than 20 ranks; ranks below 0 or above L

    Source: 'Validating Bayesian Inference Algorithms with Simulation-Based Calibration' (Talts et
    al., arXiv 1804.06788).

    >>> found = uniformity(torch.arange(100).unsqueeze(1), num_draws=99)
    >>> found.histogram, bool(found.location.abs() < 1e-6)
    (tensor([1.], dtype=torch.float64), True)
    """
    if len(ranks) < FEWEST:
        raise ValueError(
            f"Whether ranks are uniform needs at least {FEWEST} of them, got {len(ranks)}: "
            "simulate more data sets."
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
    """Return how many standard errors a mean is off, if all that is possible is equally likely."""
    deviation = possible.std(correction=0)
    return (found.mean(0) - possible.mean()) / deviation * math.sqrt(len(found))


def holm(p_values: Tensor) -> Tensor:
    """Return p-values ``[k]`` adjusted for their number, after Holm.

    >>> holm(torch.tensor([0.01, 0.04, 0.03]))
    tensor([0.0300, 0.0600, 0.0600])
    """
    ordered, order = p_values.sort()
    number = torch.arange(len(p_values), 0, -1, device=p_values.device)
    adjusted = (ordered * number).clamp_max(1).cummax(0).values
    return torch.empty_like(adjusted).scatter(0, order, adjusted)


@dataclass(frozen=True)
class Calibration:
    """The ranks of true latents among L draws of a guide, and whether they are uniform.

    ``ranks`` has integers ``[N, dims]`` for each site, 0 to ``num_draws``: of N simulated data
    sets, in each of a site's numbers (plates inside a data set and event dims, flattened).

    :raises ValueError: fewer than 20 data sets, no site, or ranks out of their range

    >>> found = Calibration({"z": torch.arange(100).unsqueeze(1) // 2}, num_draws=99)
    >>> print(found)
    Not calibrated in 1 of 1 numbers at level 0.01:
    z: the draws are too high (adjusted p-value 1.4e-17)
    """

    ranks: dict[str, Tensor]
    num_draws: int

    def __post_init__(self) -> None:
        """Test at once: too few ranks should not go unnoticed."""
        _ = self.tests

    @cached_property
    def tests(self) -> dict[str, Uniformity]:
        """The tests of each site, ``[dims]``."""
        if not self.ranks:
            raise ValueError("There are no ranks: no latent site was ranked.")
        return {name: uniformity(own, self.num_draws) for name, own in self.ranks.items()}

    @property
    def p_values(self) -> dict[str, Tensor]:
        """The p-values ``[dims]`` of each site, for this number alone."""
        return {name: found.p_value for name, found in self.tests.items()}

    @property
    def adjusted(self) -> dict[str, Tensor]:
        """The same, adjusted for the number of all tests (Holm)."""
        names, own = zip(*self.p_values.items(), strict=True)
        parts = holm(torch.cat(own)).split([len(p) for p in own])
        return dict(zip(names, parts, strict=True))

    def is_calibrated(self, level: float = 0.01) -> bool:
        """Whether no adjusted p-value is below the level.

        That more data sets would not tell is not said; nor that the posterior is right for one data
        set in particular: ranks average over the prior.
        """
        return all(bool((p >= level).all()) for p in self.adjusted.values())

    def verdict(self, level: float = 0.01) -> str:
        """Return in words what was found: which numbers are off, and how."""
        lines = [
            f"{name}{f'[{dim}]' if len(p) > 1 else ''}: {self._fault(name, dim)} "
            f"(adjusted p-value {p[dim].item():.2g})"
            for name, p in self.adjusted.items()
            for dim in (p < level).nonzero().flatten().tolist()
        ]
        first = next(iter(self.ranks.values()))
        count = sum(own.shape[1] for own in self.ranks.values())
        if not lines:
            smallest = min(p.min().item() for p in self.adjusted.values())
            return (
                f"No fault found in {count} numbers with {len(first)} simulated data sets "
                f"(smallest adjusted p-value {smallest:.2g})."
            )
        head = f"Not calibrated in {len(lines)} of {count} numbers at level {level:g}:"
        return "\n".join([head, *lines])

    def _fault(self, name: str, dim: int) -> str:
        """Say how ranks are off; of two faults the clearer one, as a shift widens ranks, too."""
        found = self.tests[name]
        location, spread = found.location[dim].item(), found.spread[dim].item()
        fault = "of a wrong shape"
        if abs(location) > max(CLEAR, abs(spread)):
            fault = "too low" if location > 0 else "too high"
        elif abs(spread) > CLEAR:
            fault = "too narrow" if spread > 0 else "too wide"
        return f"the draws are {fault}"

    def __str__(self) -> str:
        """Return the verdict."""
        return self.verdict()
