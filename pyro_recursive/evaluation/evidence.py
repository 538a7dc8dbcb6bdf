"""The evidence log p(x), estimated with many samples in bounded memory."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.evaluation.calls import measurement
from pyro_recursive.evaluation.passes import Passes
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import check_likelihood, check_match, check_subsampling
from pyro_recursive.tracing.densities import densities
from pyro_recursive.tracing.guide_values import outside_of_plates
from pyro_recursive.tracing.plates import PlateLayout, layout_of
from pyro_recursive.tracing.program import Program, structure_of
from pyro_recursive.tracing.runs import ParticleRun, run_particles
from pyro_recursive.tracing.sites import Site, subsample_sites

# Rows (particles times data) of one chunk: large enough for the hardware, small enough for caches.
CHUNK_ROWS = 5000


class Evidence(NamedTuple):
    """Estimates per datum, ``[*plates]``-dim each, in float64.

    ``log_marginal`` in nats; its ``standard_error`` in nats by the delta method, ``sqrt(1 / ess - 1
    / K)``; ``ess``, the effective sample size in samples, between 1 and K: 0, with an infinite
    error, where all weights are 0. A small one makes the others unreliable.
    """

    log_marginal: Tensor
    standard_error: Tensor
    ess: Tensor


class WeightSums:
    """Running sums of weights and squared weights that come in chunks: logarithms, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.first = self.second = torch.tensor(-math.inf, dtype=torch.float64)

    def add(self, log_weights: Tensor) -> None:
        """Add a chunk of log-weights, ``[k, *plates]`` in float64."""
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
    model: Callable, guide: Callable, *args: Any, diagnostics: Literal[False] = ..., **kwargs: Any
) -> Tensor: ...


@overload
def log_marginal(
    model: Callable, guide: Callable, *args: Any, diagnostics: Literal[True], **kwargs: Any
) -> Evidence: ...


@measurement()
def log_marginal(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_particles: int = 5000,
    chunk_size: int | None = None,
    max_plate_nesting: float = math.inf,
    vectorize_particles: bool | str = True,
    diagnostics: bool = False,
    compile: bool = False,
    **kwargs: Any,
) -> Tensor | Evidence:
    """Estimate log p(x) by importance sampling from the guide, in nats per datum.

        log(1 / K sum_k p(x, z_k) / q(z_k)),   z_k ~ q

    with K = ``num_particles``: a lower bound in expectation, to be reported as IWAE-5000. The rows
    are those of this minibatch, without any subsample scale. A user's own scales (`poutine.scale`)
    stay in the weights. Modules run in the mode they are in: call ``.eval()`` first.

    Args:
        model, guide: called with the other arguments, as by `pyro.infer.SVI.step`.
        num_particles: K.
        chunk_size: samples in one pass; memory does not grow with K. By default about 5,000 rows.
        max_plate_nesting: the dims of plates; found by a run if infinite.
        vectorize_particles: as in `pyro_recursive.MultiSampleELBO`; False loops over the samples.
        diagnostics: whether to return an `Evidence`, with standard error and sample size.
        compile: whether to compile the passes of ``chunk_size`` samples: from the same seed the
            same result to rounding. What cannot be compiled runs eagerly, with a warning.

    Returns:
        A ``[*plates]``-dim tensor for the plates that enclose every sample site, in float64.

    Raises:
        ValueError: a subsampled plate does not enclose every site; and as
            `pyro_recursive.MultiSampleELBO` does.

    Reference: `Importance Weighted Autoencoders` (Burda et al., arXiv 1509.00519).

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
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
    run: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "vectorize": vectorize_particles}
    run["by_value"] = True
    weights, chunk = WeightSums(), (chunk_size, compile)
    for found, _ in results_in_chunks(program, num_particles, log_weights, *chunk, **run):
        weights.add(found)
    return weights.evidence() if diagnostics else weights.evidence().log_marginal


def log_weights(runs: Sequence[ParticleRun], layout: PlateLayout) -> Tensor:
    """Return the log-weights of a chunk, ``[k, *plates]`` in float64."""
    return densities(runs, layout).marginal_log_weights[0].double()


Collect = Callable[[list[ParticleRun], PlateLayout], Any]


@torch.no_grad()
def results_in_chunks(
    program: Program,
    total: int,
    collect: Collect,
    chunk_size: int | None = None,
    compile: bool = False,
    *,
    any_minibatch: bool = False,
    by_value: bool = False,
    **options: Any,
) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Yield what is collected of each chunk of `total` samples on one minibatch.

    And the names of the plates that enclose every sample site.

    ``collect`` takes the runs of a chunk and their plates. With ``any_minibatch`` a subsampled
    plate may enclose only some of the sites. ``by_value`` is as in `run_particles`, where the
    latents that the guide enumerates are in the plates of the weights; they are sampled elsewhere.
    """
    size = chunk_size or particles_per_chunk(program)
    plates, minibatch = list[str](), list[poutine.Trace]()

    def run(passes: Passes, count: int) -> Any:
        nonlocal by_value
        subsample = minibatch[0] if minibatch else None
        particles, runs = run_particles(
            program, 1, count, subsample=subsample, by_value=by_value, **options
        )
        layout = layout_of(particles, [run.table for run in runs])
        if particles.values and outside_of_plates(runs[0].table, layout) is not None:
            by_value = False
            return passes.run(passes, count)  # not by its own name: that would be a cycle
        if not minibatch:
            check_match(runs[0].table, layout.max_plate_nesting)
            check_likelihood(runs[0].model)
            if not any_minibatch:
                check_subsampling(runs[0].table, layout)
            minibatch.append(subsample_sites(runs[0].guide, runs[0].model))
        plates[:] = [frame.name for frame in layout.plates]
        if particles.dim is None:
            passes.loops(count)
        return collect(runs, layout)

    passes = Passes(run, program, size, total, compile=compile)
    for start in range(0, total, size):
        yield passes(min(size, total - start)), tuple(plates)


def particles_per_chunk(program: Program) -> int:
    """Return how many particles make about `CHUNK_ROWS` rows, times values that are enumerated."""
    structure = structure_of(program)
    number = samples_per_chunk((*structure.model.values(), *structure.guide.values()))
    return max(1, number // (structure.num_values * math.prod(structure.value_axes or ())))


def samples_per_chunk(sites: Iterable[Site]) -> int:
    """Return how many samples of these sites make about `CHUNK_ROWS` rows."""
    rows = [
        math.prod(frame.size for frame in site["cond_indep_stack"] if frame.vectorized)
        for site in sites
    ]
    return max(1, CHUNK_ROWS // max(rows, default=1))
