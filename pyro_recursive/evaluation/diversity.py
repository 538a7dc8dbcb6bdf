"""How different the components of a mixture are: the Jensen-Shannon divergence between them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.functional import softplus

from pyro_recursive.evaluation.calls import checked, measurement
from pyro_recursive.evaluation.evidence import CHUNK_ROWS
from pyro_recursive.guides.base import LatentGuide
from pyro_recursive.guides.call import GuideCall
from pyro_recursive.guides.packing import LatentBlock
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.plates import outer_shape
from pyro_recursive.tracing.protocols import MixtureLike
from pyro_recursive.tracing.sites import PARTICLE_PLATE


class Diversity(NamedTuple):
    """How different the M components of mixtures are: float64, in nats.

    ``divergence`` ``[*batch]`` is ``sum_m a_m KL(q_m || sum_j a_j q_j)`` for weights a: between 0,
    of equal components, and ``entropy``, that of the weights, without overlap; ``error`` is its
    standard error. ``pairwise`` ``[*batch, M, M]`` is that of two components with equal weights.
    """

    divergence: Tensor
    error: Tensor
    entropy: Tensor
    pairwise: Tensor

    @property
    def effective_components(self) -> Tensor:
        """The number of equally weighted components without overlap that are as diverse: 1 to M."""
        return self.divergence.exp()


@checked
def jensen_shannon(log_densities: Tensor, log_weights: Tensor) -> Diversity:
    """Estimate the Jensen-Shannon divergence of mixtures from draws of each component.

        sum_m a_m mean_s [log q_m(z_ms) - log sum_j a_j q_j(z_ms)],   z_ms ~ q_m

    unbiased, and never above the entropy of the weights. A component with no weight is left out of
    all but ``pairwise``.

    Args:
        log_densities: ``[M, S, *batch, M]`` nats: of draw s from the component of the first dim,
            under that of the last.
        log_weights: ``[*batch, M]`` nats, normalised.

    Raises:
        ValueError: the shapes do not fit; a draw has no finite density under its own component.

    References: 'Divergence Measures Based on the Shannon Entropy' (Lin, 1991); 'Multiple Importance
    Sampling ELBO and Deep Ensembles' (Kviman et al., arXiv 2202.10951).

    >>> import torch.distributions as dist
    >>> parts = dist.Normal(torch.tensor([-50.0, 50.0]), 1.0)
    >>> draws = parts.sample((10,)).T  # [M, S]
    >>> found = jensen_shannon(parts.log_prob(draws.unsqueeze(-1)), torch.tensor([0.5, 0.5]).log())
    >>> bool(found.divergence.isclose(found.entropy)), round(found.effective_components.item(), 6)
    (True, 2.0)
    """
    table, log_weights = log_densities.double(), log_weights.double()
    if (len(table), *table.shape[2:]) != (log_weights.shape[-1], *log_weights.shape):
        raise ValueError(
            f"log_densities must be [M, S, *batch, M] and log_weights [*batch, M], got "
            f"{tuple(table.shape)} and {tuple(log_weights.shape)}."
        )
    if table.shape[1] < 2:
        raise ValueError(f"A standard error needs 2 draws, got {table.shape[1]}.")
    own = torch.einsum("ms...m->ms...", table)  # the density under the component drawn from
    if not bool(own.isfinite().all()) or bool(table.isnan().any()):
        raise ValueError("A draw has no finite log-density of its own.")
    weights = log_weights.exp().movedim(-1, 0)  # [M, *batch]
    excess = own - torch.logsumexp(table + log_weights, -1)
    excess = torch.where(weights.unsqueeze(1) > 0, excess, 0.0)
    variance = (weights.square() * excess.var(1)).sum(0) / table.shape[1]
    # log(2 q_m / (q_m + q_j)) for z ~ q_m: the two halves of a pair's divergence.
    halves = (math.log(2) - softplus(table - own.unsqueeze(-1)).mean(1)).movedim(0, -2)
    entropy = -torch.special.xlogy(log_weights.exp(), log_weights.exp()).sum(-1)
    return Diversity(
        divergence=(weights * excess.mean(1)).sum(0),
        error=variance.sqrt(),
        entropy=entropy,
        pairwise=(halves + halves.mT) / 2,
    )


@measurement("guide")
@torch.no_grad()
def mixture_diversity(
    guide: Callable,
    *args: Any,
    num_draws: int = 100,
    **kwargs: Any,
) -> Diversity:
    """Estimate how different the components of a mixture guide are, for each datum.

    The entries of the `Diversity` are the rows of one minibatch, ``[*plates]``, where the guide has
    a mixture for each row; a scalar where it has one for all. Modules stay in their mode: call
    ``.eval()`` first. A divergence far below the entropy means that fewer components would do.

    Args:
        guide: a `MixtureGuide`; or a `RecursiveMixtureGuide`, with the components kept so far.
        num_draws: S, the draws from each component, at least 2.

    Raises:
        TypeError: the guide has no mixture.

    >>> import pyro.distributions as dist
    >>> from pyro_recursive import MixtureGuide
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
    ...     pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(4.0))
    >>> found = mixture_diversity(MixtureGuide(model, 3), num_draws=1000)
    >>> bool(found.divergence <= found.entropy), found.pairwise.shape
    (True, torch.Size([3, 3]))
    """
    check_at_least(2, num_draws=num_draws)
    bare = poutine.unwrap(guide)
    if not isinstance(bare, LatentGuide) or not isinstance(bare, MixtureLike):
        raise TypeError(
            f"Got {type(bare).__name__}: needs a MixtureGuide or a RecursiveMixtureGuide."
        )
    bare.get_ready(args, kwargs)
    with poutine.block():
        call = bare.new_call(args, kwargs)
        latents = bare.groups[-1]
        rows = call.sizes(latents)
        size = max(1, CHUNK_ROWS // math.prod((1, *rows)))
        counts = [min(size, num_draws - start) for start in range(0, num_draws, size)]
        table = torch.cat([_table(bare, latents, call, count) for count in counts], 1)
        log_weights = bare.log_weights(latents, call, bare.members)
    return jensen_shannon(_by_row(table, 2, latents, rows), _by_row(log_weights, 0, latents, rows))


def _table(guide: Any, latents: LatentBlock, call: GuideCall, count: int) -> Tensor:
    """Draw from every component, and evaluate all: ``[M, S, *batch, M]``."""
    with pyro.plate(PARTICLE_PLATE, count, dim=-guide.nesting - 1):
        if latents is not guide.groups[0]:  # guides written by hand may look at the others' values
            call.given.update(guide.sample(guide.groups[0], call))
        mixture = guide.posterior(latents, call)
        shape = torch.broadcast_shapes(outer_shape(), mixture.batch_shape)
        found = []
        for m in range(mixture.num_components):
            index = torch.full(shape, m, device=mixture.log_weights.device)
            found.append(mixture.table(mixture.draw(index, (m,))))
    return torch.stack(found)


def _by_row(tensor: Tensor, lead: int, latents: LatentBlock, rows: tuple[int, ...]) -> Tensor:
    """``[*lead, *batch, M]`` to ``[*lead, *rows, M]``."""
    batch = latents.expand_rows(torch.empty(*rows, 1)).shape[:-1]
    outer, last = tensor.shape[:lead], tensor.shape[-1]
    # What all rows share may have fewer dims.
    inner = tensor.shape[max(lead, tensor.dim() - 1 - len(batch)) : -1]
    aligned = tensor.reshape(*outer, *(1,) * (len(batch) - len(inner)), *inner, last)
    return aligned.expand(*outer, *batch, last).reshape(*outer, *rows, last)
