"""The aggregate posterior of a guide, ``q(z) = mean_i q(z | x_i)`` over the rows of a batch.

    mean KL(q(z | x) || p(z))  =  I_q(x; z)  +  KL(q(z) || p(z))

For the local latents of any guide: those inside the plate of the data. All is in nats, and of the
posterior itself, without scales and KL warm-up. Modules stay in their mode: call ``.eval()`` first.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.evaluation.calls import measurement
from pyro_recursive.evaluation.posterior_tables import PosteriorTable, RowDraws, table_of
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.program import Program


class Rate(NamedTuple):
    """How far a guide's posteriors are from the prior, in two parts: float64 scalars in nats.

    ``kl``, the mean over the rows of KL(q(z | x) || p(z)), is ``mutual_information`` plus
    ``aggregate_kl``, KL(q(z) || p(z)).
    """

    kl: Tensor
    mutual_information: Tensor
    aggregate_kl: Tensor


class ActiveUnits(NamedTuple):
    """How many latent dimensions depend on the data, and how much.

    ``variances`` are those of the posterior means over the data, by site, float64 ``[units]``: the
    site's event dims (and plates inside a row) flattened. ``number`` are above the threshold.
    """

    number: int
    variances: dict[str, Tensor]


@measurement("guide")
@torch.no_grad()
def mutual_information(
    guide: Callable,
    *args: Any,
    num_draws: int = 1,
    plate: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """Estimate ``I_q = E[log q(z | x)] - E[log q(z)]`` over a batch, a float64 scalar in nats.

    q(z) is the mixture of the B posteriors of the batch: the estimate never exceeds log B, and
    where it is near, pass more rows. It is unbiased for this batch, and for data drawn at random a
    lower bound in expectation. 0 is a collapsed posterior. Costs S * B**2 densities, in chunks.

    Args:
        guide: samples the latents of a row inside the plate of the rows, from distributions.
        num_draws: S, the draws for each row.
        plate: the name of the rows' plate; None is the one around all latents that are in any.

    Raises:
        ValueError: the rows' plate is not clear; the latents have a joint density over the rows, or
            none (an auxiliary site, a Delta).

    References: 'Lagging Inference Networks and Posterior Collapse' (He et al., arXiv 1901.05534);
    'On Variational Bounds of Mutual Information' (Poole et al., arXiv 1905.06922).

    >>> import pyro, pyro.distributions as dist
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x, 1.0))
    >>> round(mutual_information(guide, torch.tensor([0.0, 50.0, 100.0])).exp().item(), 6)
    3.0
    """
    check_at_least(1, num_draws=num_draws)
    table = table_of(guide, args, kwargs, plate)
    found = [_information(table, draws)[1] for draws in table.split(num_draws)]
    return torch.cat(found).mean()


@measurement()
@torch.no_grad()
def rate_of(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 1,
    plate: str | None = None,
    **kwargs: Any,
) -> Rate:
    """Estimate the mean KL(q(z | x) || p(z)) over a batch, and its two parts, from the same draws.

    p(z) is the model's density of the rows' latents, given the latents outside of the rows; where
    it depends on the data, ``aggregate_kl`` is just the difference. With few rows ``aggregate_kl``
    is that of a mixture with few components: large. Arguments and errors as in
    `mutual_information`.

    Reference: 'ELBO surgery' (Hoffman & Johnson, NIPS workshop 2016).

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
    >>> def collapsed(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> rate_of(model, collapsed, torch.ones(3)).kl.item()
    0.0
    """
    check_at_least(1, num_draws=num_draws)
    table = PosteriorTable(Program(model, guide, args, kwargs), plate)
    parts = [
        (*_information(table, draws), table.log_prior(draws).flatten())
        for draws in table.split(num_draws)
    ]
    own, mutual, prior = (torch.cat(column) for column in zip(*parts, strict=True))
    return Rate((own - prior).mean(), mutual.mean(), (own - mutual - prior).mean())


def _information(table: PosteriorTable, draws: RowDraws) -> tuple[Tensor, Tensor]:
    """Return log q(z_j | x_j), and the same minus log q(z_j): ``[S * B]`` nats both."""
    own: list[Tensor] = []
    mixture: list[Tensor] = []
    for block in table.blocks(draws):
        start = sum(len(part) for part in own)
        row = torch.arange(start, start + len(block), device=block.device) % table.num_rows
        own.append(block.gather(1, row.unsqueeze(1)).squeeze(1))
        mixture.append(block.logsumexp(1) - math.log(table.num_rows))
    return torch.cat(own), torch.cat(own) - torch.cat(mixture)


@measurement("guide")
@torch.no_grad()
def active_units(
    guide: Callable,
    *args: Any,
    threshold: float = 0.01,
    num_draws: int = 100,
    plate: str | None = None,
    **kwargs: Any,
) -> ActiveUnits:
    """Count the latent dimensions whose posterior mean varies over the data.

    The variance over B rows of a mean that S draws estimate, without the noise of the estimate;
    with d the draws minus each draw's mean over the rows:

        sum_i (mean_s d_si ** 2 - var_s d_si / S) / (B - 1)

    It is unbiased, and may be a little below 0 for an inactive unit. ``threshold`` is in the square
    of the latent's own unit (the paper's 0.01 is for N(0, 1) priors), ``num_draws`` S is at least
    2.

    Reference: 'Importance Weighted Autoencoders' (Burda et al., arXiv 1509.00519).

    >>> import pyro, pyro.distributions as dist
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         loc = torch.stack([x, torch.zeros(len(x))], -1)
    ...         pyro.sample("z", dist.Normal(loc, 0.1).to_event(1))
    >>> active_units(guide, torch.tensor([-1.0, 0.0, 1.0])).number
    1
    """
    check_at_least(2, num_draws=num_draws)
    table = table_of(guide, args, kwargs, plate)
    if table.num_rows < 2:
        raise ValueError("A variance over the data needs at least 2 rows, got 1.")
    chunks, variances = [table.values(draws) for draws in table.split(num_draws)], {}
    for name in chunks[0]:
        draws = torch.cat([each[name] for each in chunks]).double()  # [S, B, units]
        centred = draws - draws.mean(1, keepdim=True)
        noise = centred.var(0) / num_draws
        variances[name] = (centred.mean(0) ** 2 - noise).sum(0) / (table.num_rows - 1)
    return ActiveUnits(sum(int((v > threshold).sum()) for v in variances.values()), variances)
