"""How many latent dimensions of a guide depend on the data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.evaluation.posterior_tables import PosteriorTable, alone
from pyro_recursive.tracing.arguments import check_at_least

__all__ = ["ActiveUnits", "active_units"]


class ActiveUnits(NamedTuple):
    """How many latent dimensions depend on the data, and how much.

    ``number`` of them have a variance over the data, of their posterior mean, above the threshold;
    ``variances`` are these by site, float64 ``[units]``: the site's event dims (and plates inside a
    row) flattened, in the square of the latent's own unit.
    """

    number: int
    variances: dict[str, Tensor]


@torch.no_grad()
def active_units(
    guide: Callable,
    *args: Any,
    threshold: float = 0.01,
    num_draws: int = 100,
    plate: str | None = None,
    **kwargs: Any,
) -> ActiveUnits:
    """Count the latent dimensions whose posterior mean varies over the data, as `ActiveUnits`.

    The variance over B rows of a mean m_i that S draws estimate; with d the draws minus each
    draw's mean over the rows, the noise of the estimates is taken off:

        sum_i (mean_s d_si ** 2 - var_s d_si / S) / (B - 1)

    which is unbiased, also where latents outside the rows move all rows at once, and may be a
    little below 0 for an inactive unit.

    :param threshold: in the square of the latent's own unit; the paper's 0.01 is for N(0, 1) priors
    :param num_draws: S, at least 2
    :raises ValueError: numbers out of range, fewer than 2 rows; else as `mutual_information`,
        as are the other arguments

    Source: 'Importance Weighted Autoencoders' (Burda et al., arXiv 1509.00519).

    >>> import pyro, pyro.distributions as dist
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         loc = torch.stack([x, torch.zeros(len(x))], -1)
    ...         pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))
    >>> active_units(guide, torch.tensor([-1.0, 0.0, 1.0])).number
    1
    """
    check_at_least(2, num_draws=num_draws)
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}.")
    exchange = PosteriorTable(alone(guide, args, kwargs), plate)
    if exchange.num_rows < 2:
        raise ValueError("A variance over the data needs at least 2 rows, got 1.")
    moments: dict[str, _Moments] = {}
    for draws in exchange.split(num_draws):
        for name, value in exchange.values(draws).items():
            moments.setdefault(name, _Moments()).add(value.double())
    variances = {name: each.variance_of_means() for name, each in moments.items()}
    return ActiveUnits(sum(int((v > threshold).sum()) for v in variances.values()), variances)


class _Moments:
    """Mean and sum of squares over draws, each taken relative to its mean over the rows."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in draws ``[S, B, units]``."""
        centred = values - values.mean(1, keepdim=True)
        mean, count = centred.mean(0), len(values)
        shift = mean - self.mean.to(mean)
        between = shift**2 * self.count * count / (self.count + count)
        self.squares = self.squares.to(mean) + ((centred - mean) ** 2).sum(0) + between
        self.count += count
        self.mean = self.mean.to(mean) + shift * count / self.count

    def variance_of_means(self) -> Tensor:
        """Return the unbiased variance over the rows of their means, ``[units]``."""
        noise = self.squares / (self.count - 1) / self.count
        return (self.mean**2 - noise).sum(0) / (len(self.mean) - 1)
