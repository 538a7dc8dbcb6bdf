"""Draws of all latents of a model from a guide, as they are or resampled by their weights."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.evaluation.draws.collected import (
    computed_values,
    latent_values,
)
from pyro_recursive.evaluation.draws.drawn import Kind, SiteDraws, joined
from pyro_recursive.evaluation.draws.model_runs import Run, runs_of_model
from pyro_recursive.evaluation.draws.own_scales import scaled_guide
from pyro_recursive.evaluation.draws.resampling import chosen
from pyro_recursive.evaluation.evidence import particles_per_chunk, runs_in_chunks
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import half_subsampled
from pyro_recursive.tracing.densities import densities
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import ParticleRun
from pyro_recursive.tracing.sites import subsample_sites

__all__ = ["Draws", "collected", "posterior_draws"]

Resample = Literal["plain", "psis"]
PROPOSALS = 10  # for each resampled draw, where nothing else is asked for


@dataclass(frozen=True)
class Draws:
    """S draws of some sites of a model.

    ``draws["z"]`` is ``[S, *plates, *event]``, for the vectorised plates around the site, from left
    to right in Pyro's order; ``sites["z"].plates`` are their names. ``log_p`` and ``log_q``, those
    of posterior draws, are log p(x, z) and log q(z), ``[S, *plates]`` in nats, float64, for the
    ``plates`` that enclose every sample site; where they are None, ``unweighted`` says why.
    ``resampled`` draws were chosen by their weights.

    ``minibatch`` is that of the plates that have latents, which other calls of the model must have,
    too; ``whole_minibatch`` that of all plates in the call that the draws are from. ``scaled``
    names the sites of log-likelihoods whose model has a scale of the user's own there.
    """

    sites: dict[str, SiteDraws]
    count: int
    log_p: Tensor | None = None
    log_q: Tensor | None = None
    plates: tuple[str, ...] = ()
    resampled: bool = False
    minibatch: poutine.Trace = field(default_factory=poutine.Trace, repr=False)
    whole_minibatch: poutine.Trace = field(default_factory=poutine.Trace, repr=False)
    unweighted: str = ""
    scaled: tuple[str, ...] = ()

    @property
    def log_densities(self) -> tuple[Tensor, Tensor]:
        """``log_p`` and ``log_q``; raises ValueError for draws that have none."""
        if self.log_p is None or self.log_q is None:
            raise ValueError(
                "These draws have no log p(x, z) and log q(z): only posterior draws have, from a "
                f"guide with a density. {self.unweighted}".rstrip()
            )
        return self.log_p, self.log_q

    @property
    def log_weights(self) -> Tensor:
        """``log_p - log_q``, ``[S, *plates]`` in nats."""
        log_p, log_q = self.log_densities
        return log_p - log_q

    def __getitem__(self, name: str) -> Tensor:
        """Return the values of a site, ``[S, *plates, *event]``."""
        if name not in self.sites:
            raise KeyError(f"There are no draws of a site '{name}'; there are {[*self.sites]}.")
        return self.sites[name].value

    def __len__(self) -> int:
        """Return the number of draws."""
        return self.count

    def of_this_call(self) -> "Draws":
        """Return the draws with their whole minibatch, for another run on the same arguments."""
        return replace(self, minibatch=self.whole_minibatch)

    def of_kind(self, *kinds: Kind) -> dict[str, SiteDraws]:
        """Return sites of kinds ``"latent"``, ``"computed"`` (deterministic), ``"observed"``."""
        return {name: each for name, each in self.sites.items() if each.kind in kinds}


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
    """Draw all latent sites of a model from a guide, and what the model computes from them.

    With ``resample`` the draws are chosen among ``num_proposals`` (by default 10 for each) by their
    importance weights: ``"plain"``, or ``"psis"``, Pareto-smoothed. Where a plate encloses every
    sample site, each of its entries chooses on its own; else the draws are chosen as a whole. This
    corrects a guide that is somewhat off; k-hat of `importance_weights` tells whether it can.

    Draws are those of one minibatch, where a plate is subsampled. If it does not enclose every
    site, or if the guide has a scale of its own (`poutine.scale`), they have no log p and log q,
    and cannot be resampled. Scales in the model are part of its density. Deterministic sites are
    the model's, with its data. Modules are used in the mode they are in: call ``.eval()`` first, if
    they have dropout or batch norm. A keyword of the model that has the name of one here cannot be
    passed: wrap the model.

    :param chunk_size: how many samples run at once; by default about 5,000 rows
    :param vectorize_particles: False runs the samples one by one
    :raises ValueError: a number is out of range; an entry has no proposal with any weight; draws
        without densities are to be resampled; and as `pyro_recursive.log_marginal` does

    Source: of ``"psis"`` `Pareto Smoothed Importance Sampling` (Vehtari et al., arXiv 1507.02646).

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
    >>> draws["z"].mean(0).round(decimals=1).tolist()
    [1.0, -1.0]
    >>> draws["positive"].shape, draws.log_p.shape
    (torch.Size([1000, 2]), torch.Size([1000, 2]))
    """
    check_at_least(1, num_draws=num_draws, num_proposals=num_proposals, chunk_size=chunk_size)
    if resample not in (None, "plain", "psis"):
        raise ValueError(f"resample must be None, 'plain' or 'psis', got {resample!r}")
    if num_proposals is not None and resample is None:
        raise ValueError("num_proposals is for resample='plain' or 'psis', which is None here")
    program = Program(model, guide, args, kwargs)
    count = num_draws if resample is None else num_proposals or PROPOSALS * num_draws
    with torch.no_grad():
        size = chunk_size or particles_per_chunk(program)
        options = {"max_plate_nesting": max_plate_nesting, "vectorize": vectorize_particles}
        chunks = runs_in_chunks(program, count, size, any_minibatch=True, **options)
        draws = _from_guide(chunks, weighted=resample is not None)
        if resample is not None:
            draws = _resampled(draws, num_draws, smooth=resample == "psis")
        run = {"vectorize": vectorize_particles, "chunk_size": chunk_size}
        found = collected(program, draws.of_this_call(), computed_values, run)
    return replace(draws, sites={**draws.sites, **found})


def _from_guide(
    chunks: Iterable[tuple[Sequence[ParticleRun], PlateLayout]], *, weighted: bool
) -> Draws:
    """Return the latents of a guide's runs, with their densities where they have any.

    :param weighted: whether they must have
    """
    parts: list[Draws] = []
    reason = ""
    for runs, layout in chunks:
        if not parts:
            reason = scaled_guide(runs[0].guide) or _half_subsampled(runs, layout)
        if reason and weighted:
            raise ValueError(reason)
        parts.append(_latents(runs, layout, reason, weighted=weighted))
    return _joined(parts)


def _half_subsampled(runs: Sequence[ParticleRun], layout: PlateLayout) -> str:
    """Return why draws of a minibatch have no weights, in words, if they have none."""
    found = half_subsampled(runs[0].table, layout)
    if found is None:
        return ""
    frame, outside = found
    return (
        f"Plate '{frame.name}' is subsampled ({frame.size} of {frame.full_size}) and does not "
        f"enclose site '{outside}', whose weights need log p of all data. Pass the full data, "
        "without a subsample, to weigh or resample the draws."
    )


def _latents(
    runs: Sequence[ParticleRun], layout: PlateLayout, unweighted: str, *, weighted: bool
) -> Draws:
    """Return the latents of one chunk of runs of a guide, with their densities.

    :param unweighted: why they have none; a guide of points has none, either
    """
    particles, plates = layout.particles, tuple(frame.name for frame in layout.plates)
    latents = latent_values(Run([run.model for run in runs], particles, layout.max_plate_nesting))
    whole = subsample_sites(runs[0].guide, runs[0].model)
    minibatch = _in_plates(whole, latents.values())
    draws = Draws(latents, particles.total, None, None, plates, False, minibatch, whole)
    if unweighted:
        return replace(draws, unweighted=unweighted)
    try:
        log_p, log_q = _log_densities(runs, layout)
    except NotImplementedError as error:
        if weighted:
            raise
        return replace(draws, unweighted=str(error))
    return replace(draws, log_p=log_p, log_q=log_q)


def _log_densities(runs: Sequence[ParticleRun], layout: PlateLayout) -> tuple[Tensor, Tensor]:
    """Return log p and log q of one chunk, ``[k, *plates]`` in float64."""
    found = densities(runs, layout)
    groups = [group for group in (found.density, found.score, found.jacobian) if group is not None]
    shape = (1, layout.particles.total, *layout.shape)
    log_p = torch.zeros(shape) if found.model is None else found.model.expand(shape)
    log_q = sum(groups, torch.zeros_like(log_p))
    return log_p[0].double(), log_q[0].double()


def _in_plates(minibatch: poutine.Trace, latents: Iterable[SiteDraws]) -> poutine.Trace:
    """Keep the minibatch of the plates that have latents: that of others is any call's own."""
    names = {name for latent in latents for name in (*latent.plates, *latent.cell)}
    kept = poutine.Trace()
    for name in names & minibatch.nodes.keys():
        kept.add_node(name, **minibatch.nodes[name])
    return kept


def _joined(chunks: Sequence[Draws]) -> Draws:
    """Put chunks of draws of one minibatch together."""
    total, sites = sum(map(len, chunks)), join([chunk.sites for chunk in chunks])
    draws = replace(chunks[0], sites=sites, count=total)
    if draws.log_p is None:
        return draws
    log_p, log_q = (
        torch.cat(each) for each in zip(*(c.log_densities for c in chunks), strict=True)
    )
    return replace(draws, log_p=log_p, log_q=log_q)


def join(chunks: Sequence[dict[str, SiteDraws]]) -> dict[str, SiteDraws]:
    """Put chunks of draws of the same sites together."""
    return {name: joined([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _resampled(draws: Draws, count: int, *, smooth: bool) -> Draws:
    """Choose draws by their weights, each entry of the shared plates on its own."""
    index = chosen(draws.log_weights, count, draws.plates, smooth=smooth)
    sites = {name: each.take(index, draws.plates) for name, each in draws.sites.items()}
    log_p, log_q = (log_density.gather(0, index) for log_density in draws.log_densities)
    return replace(draws, sites=sites, count=count, log_p=log_p, log_q=log_q, resampled=True)


def collected(
    program: Program,
    draws: Draws,
    collect: Callable[[Run], dict[str, SiteDraws]],
    options: dict[str, Any],
) -> dict[str, SiteDraws]:
    """Run the model on the latents of draws, and gather what is asked for."""
    latents = draws.of_kind("latent")
    runs = runs_of_model(program, len(draws), latents, draws.minibatch, **options)
    return join([collect(run) for run in runs])
