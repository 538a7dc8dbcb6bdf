"""The aggregate posterior of a guide, ``q(z) = mean_i q(z | x_i)`` over the rows of a batch.

With z_j drawn from the posterior of row j, the table ``log q(z_j | x_i)`` tells how much the
latents know about the data, and how far their distribution over all data is from the prior:

    mean KL(q(z | x) || p(z))  =  I_q(x; z)  +  KL(q(z) || p(z))

For the local latents of any guide: those inside the plate of the data. Latents outside of it keep
one value in each draw. All is in nats, and of the posterior itself: a user's scales, KL warm-up and
subsample scales are no part of it. Modules are used in the mode they are in: call ``.eval()``
first, if they have dropout or batch norm.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.evaluation.active_units import ActiveUnits, active_units
from pyro_recursive.evaluation.posterior_tables import PosteriorTable, RowDraws, alone
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.program import Program

__all__ = [
    "ActiveUnits",
    "Rate",
    "active_units",
    "mutual_information",
    "posterior_table",
    "rate_of",
]


class Rate(NamedTuple):
    """How far a guide's posteriors are from the prior, and what that is made of.

    Float64 scalars in nats: ``kl``, the mean over the rows of KL(q(z | x) || p(z)), is
    ``mutual_information`` plus ``aggregate_kl``, KL(q(z) || p(z)).
    """

    kl: Tensor
    mutual_information: Tensor
    aggregate_kl: Tensor


@torch.no_grad()
def posterior_table(
    guide: Callable,
    *args: Any,
    plate: str | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return log q(z_j | x_i), with one draw z_j for each row: ``[B, B]`` nats, float64.

    The draw j is the first dim, the row i whose posterior is asked the second. Arguments, errors
    and cost are those of `mutual_information`.

    >>> import pyro, pyro.distributions as dist
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x, 1.0))
    >>> posterior_table(guide, torch.tensor([0.0, 50.0])).argmax(1)
    tensor([0, 1])
    """
    exchange = PosteriorTable(alone(guide, args, kwargs), plate, chunk_size)
    return torch.cat(list(exchange.strips(exchange.draw(1))))


@torch.no_grad()
def mutual_information(
    guide: Callable,
    *args: Any,
    num_draws: int = 1,
    plate: str | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Estimate ``I_q = E[log q(z | x)] - E[log q(z)]`` over a batch, a float64 scalar in nats.

    q(z) is the mixture of the B posteriors of the batch, so that the estimate never exceeds log B,
    whatever the guide: where it comes near, pass more rows. It is unbiased for this batch, and for
    data drawn at random a lower bound in expectation. 0 is a collapsed posterior.

    Cost: each of S * B draws under the posteriors of all B rows, so S * B**2 densities in chunks.

    :param guide: any guide that samples the latents of a row inside the plate of the rows, from
        distributions (not as points); called as ``guide(*args, **kwargs)``. A keyword with the name
        of one here cannot be passed on
    :param num_draws: S, the draws for each row
    :param plate: the name of the rows' plate; None is the one around all latents that are in any
    :param chunk_size: how many draws one pass evaluates under all rows; None is about 50,000 / B
    :raises ValueError: a number is below 1; the rows' plate is not there, not clear or a loop; the
        latents have a joint density over the rows, or none: an auxiliary site, a Delta. Names the
        site and what to do

    Sources: 'Lagging Inference Networks and Posterior Collapse in Variational Autoencoders' (He et
    al., arXiv 1901.05534); the bound: 'On Variational Bounds of Mutual Information' (Poole et al.,
    arXiv 1905.06922).

    >>> import pyro, pyro.distributions as dist
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x, 1.0))
    >>> round(mutual_information(guide, torch.tensor([0.0, 50.0, 100.0])).exp().item(), 6)
    3.0
    """
    check_at_least(1, num_draws=num_draws)
    exchange = PosteriorTable(alone(guide, args, kwargs), plate, chunk_size)
    found = [_information(exchange, draws).mutual for draws in exchange.split(num_draws)]
    return torch.cat(found).mean()


@torch.no_grad()
def rate_of(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 1,
    plate: str | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Rate:
    """Estimate the mean KL(q(z | x) || p(z)) over a batch, and its two parts, as a `Rate`.

    All three from the same draws, so that the parts add up. p(z) is the model's density of the
    rows' latents, given the latents outside of the rows; where it depends on the data (a
    conditional prior), so does the KL, and ``aggregate_kl`` is just the difference. Parts of a
    collapsed posterior are 0. As the mutual information is at most log B, ``aggregate_kl`` of few
    rows is that of a mixture with few components: large.

    :param model: called as ``model(*args, **kwargs)``, like the guide; the rest is as in
        `mutual_information`
    :raises ValueError: as there; a latent site is inside the rows' plate in one of the programs
        only, or missing in the guide

    Source: the parts are those of 'ELBO surgery' (Hoffman & Johnson, NIPS workshop 2016).

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def collapsed(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> rate_of(model, collapsed, torch.ones(3)).kl.item()
    0.0
    """
    check_at_least(1, num_draws=num_draws)
    exchange = PosteriorTable(Program(model, guide, args, kwargs), plate, chunk_size)
    parts = [
        (information.own, information.mutual, exchange.log_prior(draws).flatten())
        for draws in exchange.split(num_draws)
        for information in [_information(exchange, draws)]
    ]
    own, mutual, prior = (torch.cat(column) for column in zip(*parts, strict=True))
    return Rate((own - prior).mean(), mutual.mean(), (own - mutual - prior).mean())


class _Information(NamedTuple):
    """Of each draw: log q(z_j | x_j), and what it tells about its row; ``[S * B]`` nats."""

    own: Tensor
    mutual: Tensor


def _information(exchange: PosteriorTable, draws: RowDraws) -> _Information:
    own: list[Tensor] = []
    mixture: list[Tensor] = []
    rows = exchange.num_rows
    for strip in exchange.strips(draws):
        start = sum(len(part) for part in own)
        number = torch.arange(start, start + len(strip), device=strip.device) % rows
        own.append(strip.gather(1, number.unsqueeze(1)).squeeze(1))
        mixture.append(strip.logsumexp(1) - math.log(rows))
    return _Information(torch.cat(own), torch.cat(own) - torch.cat(mixture))
