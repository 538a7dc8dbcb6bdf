"""The evidence log p(x), estimated with many samples in bounded memory."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import check_match, check_subsampling
from pyro_recursive.tracing.densities import densities
from pyro_recursive.tracing.plates import PlateLayout, layout_of
from pyro_recursive.tracing.program import Program, structure_of
from pyro_recursive.tracing.runs import ParticleRun, run_particles
from pyro_recursive.tracing.sites import subsample_sites

__all__ = ["Evidence", "WeightSums", "log_marginal", "particles_per_chunk", "runs_in_chunks"]

# Rows (particles times data) of one chunk: large enough for the hardware, small enough for caches.
CHUNK_ROWS = 5000


class Evidence(NamedTuple):
    """Estimates per datum, ``[*plates]`` each, in float64.

    ``log_marginal`` in nats; its Monte Carlo ``standard_error`` in nats by the delta method,
    ``sqrt(1 / ess - 1 / K)``; ``ess``, the effective sample size in samples, between 1 and K, or 0
    (and an infinite error) where no sample has any weight.
    A small ESS means that neither of the first two can be trusted.
    """

    log_marginal: Tensor
    standard_error: Tensor
    ess: Tensor


class WeightSums:
    """What is kept of log-weights that come in chunks: logarithms of sums, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.first = self.second = torch.tensor(-math.inf, dtype=torch.float64)

    def add(self, log_weights: Tensor) -> None:
        """Take a chunk, ``[k, *plates]`` in float64."""
        self.count += len(log_weights)
        self.first = torch.logaddexp(self.first.to(log_weights), log_weights.logsumexp(0))
        twice = (2 * log_weights).logsumexp(0)
        self.second = torch.logaddexp(self.second.to(log_weights), twice)

    def evidence(self) -> Evidence:
        """Return the estimates from all chunks."""
        ess = torch.exp(2 * self.first - self.second).nan_to_num(nan=0.0)  # none has any weight
        error = (1 / ess - 1 / self.count).clamp_min(0).sqrt()
        return Evidence(self.first - math.log(self.count), error, ess)


@overload
def log_marginal(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = ...,
    chunk_size: int | None = ...,
    max_plate_nesting: float = ...,
    vectorize_particles: bool = ...,
    diagnostics: Literal[False] = ...,
    **kwargs: Any,
) -> Tensor: ...


@overload
def log_marginal(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = ...,
    chunk_size: int | None = ...,
    max_plate_nesting: float = ...,
    vectorize_particles: bool = ...,
    diagnostics: Literal[True],
    **kwargs: Any,
) -> Evidence: ...


def log_marginal(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 5000,
    chunk_size: int | None = None,
    max_plate_nesting: float = math.inf,
    vectorize_particles: bool = True,
    diagnostics: bool = False,
    **kwargs: Any,
) -> Tensor | Evidence:
    """Estimate log p(x) by importance sampling from the guide, in nats per datum.

    ``log(mean_k w_k)`` with K = ``num_particles``, a lower bound on log p(x) in expectation:
    report it as IWAE-5000. Returns a ``[*plates]`` tensor for the plates that enclose every sample
    site, without any subsample scale (the values of this minibatch); a scalar where no plate
    does. With ``diagnostics=True`` an `Evidence`, with standard error and effective sample size.

    Samples come in chunks of ``chunk_size``, all on one minibatch, so that memory does not grow
    with K; by default a chunk has about 5,000 rows. Sums are kept in float64.

    Modules are used in the mode they are in: call ``.eval()`` first, if they have dropout or batch
    norm. A keyword of the model that has the name of one here cannot be passed: wrap the model.
    Scales of the user's own (`poutine.scale`) stay in the weights: take them off for log p(x).

    Raises ValueError where a subsampled plate does not enclose every site, and as
    `pyro_recursive.MultiSampleELBO` does.

    Source: `Importance Weighted Autoencoders` (Burda et al., arXiv 1509.00519).

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def posterior(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> x = torch.tensor([0.0, 1.0])
    >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    >>> bool(torch.allclose(log_marginal(model, posterior, x).to(exact), exact))
    True
    """
    check_at_least(1, num_particles=num_particles, chunk_size=chunk_size)
    program = Program(model, guide, args, kwargs)
    options: dict[str, Any] = {
        "max_plate_nesting": max_plate_nesting,
        "vectorize": vectorize_particles,
    }
    weights = WeightSums()
    with torch.no_grad():
        size = chunk_size or particles_per_chunk(program)
        for runs, layout in runs_in_chunks(program, num_particles, size, **options):
            weights.add(densities(runs, layout).log_weights[0].double())
    return weights.evidence() if diagnostics else weights.evidence().log_marginal


def runs_in_chunks(
    program: Program, total: int, size: int, *, any_minibatch: bool = False, **options: Any
) -> Iterator[tuple[list[ParticleRun], PlateLayout]]:
    """Yield runs of the program and where their plates are, until there are `total` samples.

    All are on one minibatch. Raises where model and guide do not match, and, unless it may be
    ``any_minibatch``, where a subsampled plate does not enclose every site.
    """
    minibatch = None
    for start in range(0, total, size):
        count = min(size, total - start)
        particles, runs = run_particles(program, 1, count, subsample=minibatch, **options)
        layout = layout_of(particles, [run.table for run in runs])
        if minibatch is None:
            check_match(runs[0].table, layout.max_plate_nesting)
            if not any_minibatch:
                check_subsampling(runs[0].table, layout)
            minibatch = subsample_sites(runs[0].guide, runs[0].model)
        yield runs, layout


def particles_per_chunk(program: Program) -> int:
    """Return how many particles make about `CHUNK_ROWS` rows."""
    structure = structure_of(program)
    rows = [
        math.prod(frame.size for frame in site["cond_indep_stack"] if frame.vectorized)
        for site in (*structure.model.values(), *structure.guide.values())
    ]
    return max(1, CHUNK_ROWS // max(rows, default=1))
