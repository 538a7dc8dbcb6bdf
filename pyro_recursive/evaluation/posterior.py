"""Draws of a model's latents from a guide, as they are or resampled by their weights."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.evaluation.draws import Draws, ModelRuns, SiteDraws, joined, on_draws
from pyro_recursive.evaluation.evidence import runs_in_chunks
from pyro_recursive.evaluation.importance import psis, why_scaled
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import half_subsampled
from pyro_recursive.tracing.densities import densities
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import ParticleRun
from pyro_recursive.tracing.sites import subsample_sites

Resample = Literal["plain", "psis"]
PROPOSALS = 10  # for each resampled draw, by default


def posterior_draws(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 1000,
    resample: Resample | None = None,
    num_proposals: int | None = None,
    chunk_size: int | None = None,
    max_plate_nesting: float = math.inf,
    vectorize_particles: bool = True,
    **kwargs: Any,
) -> Draws:
    """Draw all latent sites of a model from a guide, and the deterministic sites of the model.

    With ``resample`` the draws are chosen among proposals by their importance weights: each entry
    of the plates that enclose every sample site on its own, or all as a whole. The draws are those
    of one minibatch and can be resampled if its plate encloses every site and the guide has no
    `poutine.scale`. Modules run in the mode they are in. Wrap a model whose keyword has the name of
    one here.

    Args:
        num_draws: S.
        resample: ``"plain"``, or ``"psis"`` for Pareto-smoothed weights.
        num_proposals: by default 10 for each draw.
        chunk_size: samples in one pass; by default about 5,000 rows.
        max_plate_nesting, vectorize_particles: as in `pyro_recursive.log_marginal`.

    Raises:
        ValueError: draws cannot be weighted; and as `pyro_recursive.log_marginal` does.

    Source: `Pareto Smoothed Importance Sampling` (Vehtari et al., arXiv 1507.02646).

    >>> import pyro, pyro.distributions as dist
    >>> pyro.set_rng_seed(0)
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.deterministic("positive", z > 0)
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):  # too wide: the posterior is N(x / 2, 0.71)
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(0.0, 2.0).expand([len(x)]))
    >>> draws = posterior_draws(model, guide, torch.tensor([2.0, -2.0]), resample="psis")
    >>> draws["z"].mean(0).round(decimals=1).tolist(), draws["positive"].shape
    ([1.0, -1.0], torch.Size([1000, 2]))
    """
    check_at_least(1, num_draws=num_draws, num_proposals=num_proposals, chunk_size=chunk_size)
    if resample not in (None, "plain", "psis"):
        raise ValueError(f"resample must be None, 'plain' or 'psis', got {resample!r}.")
    if num_proposals is not None and resample is None:
        raise ValueError("num_proposals needs resample='plain' or 'psis'.")
    count = num_draws if resample is None else num_proposals or PROPOSALS * num_draws
    run: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "vectorize": vectorize_particles}
    with torch.no_grad():
        program = Program(model, guide, args, kwargs)
        chunks = runs_in_chunks(program, count, chunk_size, any_minibatch=True, **run)
        draws = _from_guide(chunks, count, weighted=resample is not None)
        if resample is not None:
            draws = _resampled(draws, num_draws, smooth=resample == "psis")
    call = model, args, kwargs, draws.of_this_call()
    computed = on_draws(*call, ModelRuns.computed, chunk_size, vectorize_particles)
    return replace(draws, sites={**draws.sites, **computed})


def _from_guide(
    chunks: Iterable[tuple[Sequence[ParticleRun], PlateLayout]], count: int, *, weighted: bool
) -> Draws:
    """Return the latents of a guide's runs, with log p and log q if they exist, or if weighted."""
    parts: list[dict[str, SiteDraws]] = []
    log_densities: list[tuple[Tensor, Tensor]] = []
    for runs, layout in chunks:
        if not parts:
            whole = subsample_sites(runs[0].guide, runs[0].model)
            unweighted = why_scaled(runs[0].guide) or _why_subsampled(runs[0], layout)
            if unweighted and weighted:
                raise ValueError(unweighted)
        traces = [run.model for run in runs]
        parts.append(ModelRuns(traces, layout.particles.total, layout.max_plate_nesting).latents())
        if not unweighted:
            try:
                log_densities.append(_log_densities(runs, layout))
            except NotImplementedError as error:  # a guide of points
                if weighted:
                    raise
                unweighted = str(error)
    latents, plates = joined(parts), tuple(frame.name for frame in layout.plates)
    minibatch = _in_plates(whole, latents.values())
    draws = Draws(latents, count, None, None, plates, False, minibatch, whole, unweighted)
    if unweighted:
        return draws
    log_p, log_q = (torch.cat(each) for each in zip(*log_densities, strict=True))
    return replace(draws, log_p=log_p, log_q=log_q)


def _why_subsampled(run: ParticleRun, layout: PlateLayout) -> str:
    """Return why a minibatch has no weights; nothing if it has."""
    found = half_subsampled(run.table, layout)
    if found is None:
        return ""
    frame, outside = found
    return (
        f"Plate '{frame.name}' is subsampled ({frame.size} of {frame.full_size}) and does not "
        f"enclose site '{outside}'. Pass the full data."
    )


def _log_densities(runs: Sequence[ParticleRun], layout: PlateLayout) -> tuple[Tensor, Tensor]:
    """Return log p and log q of one chunk, ``[k, *plates]`` in float64."""
    found = densities(runs, layout)
    groups = [group for group in (found.density, found.score, found.jacobian) if group is not None]
    shape = (1, layout.particles.total, *layout.shape)
    log_p = torch.zeros(shape) if found.model is None else found.model.expand(shape)
    log_q = sum(groups, torch.zeros_like(log_p))
    return log_p[0].double(), log_q[0].double()


def _in_plates(minibatch: poutine.Trace, latents: Iterable[SiteDraws]) -> poutine.Trace:
    """Return the subsample sites of the plates around latents."""
    names = {name for latent in latents for name in (*latent.plates, *latent.cell)}
    kept = poutine.Trace()
    for name in names & minibatch.nodes.keys():
        kept.add_node(name, **minibatch.nodes[name])
    return kept


def _resampled(draws: Draws, count: int, *, smooth: bool) -> Draws:
    index = resampled_index(draws.log_weights, count, draws.plates, smooth=smooth)
    taken = {name: each.take(index, draws.plates) for name, each in draws.sites.items()}
    log_p, log_q = (log_density.gather(0, index) for log_density in draws.log_densities)
    return replace(draws, sites=taken, count=count, log_p=log_p, log_q=log_q, resampled=True)


def resampled_index(
    log_weights: Tensor, count: int, plates: Sequence[str], *, smooth: bool
) -> Tensor:
    """Return indices of draws by importance resampling, with replacement.

    Args:
        log_weights: ``[S, *plates]`` in nats.
        count: how many to draw for each entry of the plates.
        plates: their names.
        smooth: whether the weights are Pareto-smoothed first.

    Returns:
        Indices below S, a ``[count, *plates]``-dim tensor.

    Raises:
        ValueError: all weights of an entry are 0 or not finite.
    """
    largest = log_weights.amax(0)
    dead = ~(largest.abs() < torch.inf)
    if bool(dead.any()):
        place = tuple(dead.nonzero()[0].tolist())
        entry = f" at {place} of plates {list(plates)}" if plates else ""
        raise ValueError(
            f"None of {len(log_weights)} draws of the guide has a weight{entry}. The largest "
            f"log-weight is {largest[place].item()}."
        )
    weights = psis(log_weights).log_weights if smooth else log_weights
    columns = weights.flatten(1).T if weights.dim() > 1 else weights.unsqueeze(0)
    index = torch.multinomial(columns.softmax(-1), count, replacement=True)
    return index.T.reshape(count, *log_weights.shape[1:])
