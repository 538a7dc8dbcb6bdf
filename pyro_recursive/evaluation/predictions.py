"""Posterior, predictive and prior draws of a model; log-likelihoods of each datum."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_recursive.evaluation.calls import sampling
from pyro_recursive.evaluation.draws import Draws, SiteDraws, joined
from pyro_recursive.evaluation.enumerated import summed_log_likelihoods, with_enumerated
from pyro_recursive.evaluation.evidence import results_in_chunks
from pyro_recursive.evaluation.importance import psis, scale_problem, scaled_sites
from pyro_recursive.evaluation.model_runs import (
    ModelRuns,
    can_be_drawn,
    is_latent,
    run_on_draws,
    was_observed,
)
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.compatibility import half_subsampled
from pyro_recursive.tracing.conditionals import drawn_index
from pyro_recursive.tracing.densities import densities
from pyro_recursive.tracing.plates import PlateLayout
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.runs import ParticleRun
from pyro_recursive.tracing.sites import subsample_sites

PROPOSALS = 10  # for each resampled draw, by default


@sampling()
def posterior_draws(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 1000,
    resample: str | None = None,
    num_proposals: int | None = None,
    chunk_size: int | None = None,
    max_plate_nesting: float = math.inf,
    vectorize_particles: bool | str = True,
    compile: bool = False,
    **kwargs: Any,
) -> Draws:
    """Draw all latent sites of a model from a guide, and the deterministic sites of the model.

    Latents y that the model enumerates, and the guide does not sample, are drawn last, from the
    exact p(y | x, z) without scales. Those that the guide enumerates are drawn from its q(y); with
    ``resample``, from the weights of all their values, whose sum is that of a proposal, as in
    `importance_weights`.

    Args:
        num_draws: S.
        resample: ``"psis"`` chooses among proposals by their Pareto-smoothed importance weights:
            each entry of the plates that enclose every site on its own.
        num_proposals: by default 10 for each draw.
        chunk_size, max_plate_nesting, vectorize_particles, compile: as in
            `pyro_recursive.log_marginal`.

    Raises:
        ValueError: draws cannot be weighted; and as `pyro_recursive.log_marginal` does.

    Reference: `Pareto Smoothed Importance Sampling` (Vehtari et al., arXiv 1507.02646).

    >>> import pyro, pyro.distributions as dist
    >>> pyro.set_rng_seed(0)
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
    >>> def guide(x):  # too wide: the posterior is N(x / 2, 0.71)
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(0.0, 2.0).expand([len(x)]))
    >>> draws = posterior_draws(model, guide, torch.tensor([2.0, -2.0]), resample="psis")
    >>> draws["z"].mean(0).round(decimals=1).tolist()
    [1.0, -1.0]
    """
    check_at_least(1, num_draws=num_draws, num_proposals=num_proposals, chunk_size=chunk_size)
    if resample not in (None, "psis"):
        raise ValueError(f"resample must be None or 'psis', got {resample!r}.")
    program = Program(model, guide, args, kwargs)
    num_chosen = num_draws if resample else None
    count = num_draws if resample is None else num_proposals or PROPOSALS * num_draws
    return draws_of(
        program,
        count,
        num_chosen,
        chunk_size=chunk_size,
        vectorize=vectorize_particles,
        compile=compile,
        max_plate_nesting=max_plate_nesting,
    )


@torch.no_grad()
def draws_of(
    program: Program,
    count: int,
    num_chosen: int | None = None,
    *,
    chunk_size: int | None = None,
    vectorize: bool | str = True,
    compile: bool = False,
    max_plate_nesting: float = math.inf,
) -> Draws:
    """Return ``count`` draws, or ``num_chosen`` of them by weight.

    Takes a `Program`, so that arguments of the model may have the names of options. These are as in
    `posterior_draws`.
    """
    run: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "vectorize": vectorize}
    is_weighted = num_chosen is not None
    draws = _from_guide(program, count, chunk_size, compile, weighted=is_weighted, **run)
    if num_chosen is not None:
        draws = draws.take(resampled_index(draws.log_weights, num_chosen, draws.plates))
    call, how = (program.model, program.args, program.kwargs), (chunk_size, vectorize)
    draws = draws.of_this_call()
    if draws.summed:
        draws = with_enumerated(*call, draws, *how, compile=compile)
    computed = run_on_draws(*call, draws, ModelRuns.computed, *how, compile=compile)
    minibatch = _minibatch_around(draws.sites, draws.whole_minibatch)
    return replace(draws, sites={**draws.sites, **computed}, minibatch=minibatch)


def _from_guide(
    program: Program,
    count: int,
    chunk_size: int | None,
    compile: bool,
    *,
    weighted: bool,
    **run: Any,
) -> Draws:
    """Return the latents of a guide's runs, with log p and log q if they exist, or if weighted."""
    known, problems, whole = dict[str, SiteDraws](), list[str](), list[poutine.Trace]()
    summed: frozenset[str] = frozenset()

    def collect(runs: Sequence[ParticleRun], layout: PlateLayout) -> tuple[dict, tuple]:
        nonlocal summed
        summed |= {record.name for run in runs for record in run.table.enumerated}
        size, models = layout.particles.total, [run.model for run in runs]
        latents = ModelRuns(models, size, layout.max_plate_nesting, models[0]).latents()
        if not whole:
            whole.append(subsample_sites(runs[0].guide, runs[0].model))
            problems.append(scale_problem(runs[0].guide) or _subsampling_problem(runs[0], layout))
        known.update({name: each for name, each in latents.items() if name not in known})
        log_densities, index = tuple[Tensor, ...](), None
        if not problems[-1]:
            try:
                log_densities, index = _log_densities(runs, layout)
            except NotImplementedError as error:  # a guide of points
                problems.append(str(error))
        if weighted and problems[-1]:
            raise ValueError(problems[-1])
        if index is not None:
            plates = [frame.name for frame in layout.plates]
            latents = {name: each.take(index, plates) for name, each in latents.items()}
        return {name: each.value for name, each in latents.items()}, log_densities

    parts, log_densities = list[dict[str, SiteDraws]](), list[tuple]()
    chunks = chunk_size, compile
    run |= {"any_minibatch": True, "by_value": weighted}
    results = results_in_chunks(program, count, collect, *chunks, **run)
    for (values, log_p_and_q), names in results:
        plates = names
        parts.append({name: replace(known[name], value=each) for name, each in values.items()})
        log_densities.append(log_p_and_q)
    log_p, log_q = None, None
    if not problems[-1]:
        log_p, log_q = (torch.cat(each) for each in zip(*log_densities, strict=True))
    found = Draws(joined(parts), count, log_p, log_q, plates, whole_minibatch=whole[0])
    return replace(found, unweighted=problems[-1], summed=summed)


def _minibatch_around(latents: Mapping[str, SiteDraws], whole: poutine.Trace) -> poutine.Trace:
    """Return the subsample sites of the plates and loops around latents."""
    around = {name for latent in latents.values() for name in (*latent.plates, *latent.cell)}
    minibatch = poutine.Trace()
    for name in around & whole.nodes.keys():
        minibatch.add_node(name, **whole.nodes[name])
    return minibatch


def _subsampling_problem(run: ParticleRun, layout: PlateLayout) -> str:
    """Return why a minibatch has no weights; nothing if it has."""
    if (found := half_subsampled(run.table, layout)) is None:
        return ""
    frame, outside = found
    return (
        f"Plate '{frame.name}' is subsampled ({frame.size} of {frame.full_size}) and does not "
        f"enclose site '{outside}'. Pass the full data."
    )


def _log_densities(
    runs: Sequence[ParticleRun], layout: PlateLayout
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Return log p and log q of one chunk, ``[k, *plates]`` in float64.

    Where the guide's values are enumerated one is drawn by its weight, and log q has the
    log-probability of that draw: log p - log q is the log of the sum of all weights. Also returned
    are the numbers of the particles that were drawn, ``[k, *plates]``.
    """
    found = densities(runs, layout)
    groups = [group for group in (found.density, found.score, found.jacobian) if group is not None]
    shape = (1, *layout.whole_shape[1:])
    device = next((each.device for each in (*groups, found.values) if each is not None), None)
    log_p = torch.zeros(shape, device=device) if found.model is None else found.model.expand(shape)
    log_q = sum(groups, torch.zeros_like(log_p))
    log_p, log_q = log_p[0].double(), log_q[0].double()
    if found.values is None:
        return (log_p, log_q), None
    if found.values_rest is not None:  # masked values count by their probability
        log_q = log_q - found.values_rest[0].double()
    log_weights = log_p - log_q
    value = drawn_index(log_weights, -1)
    chance = log_weights.log_softmax(-1).nan_to_num(nan=0.0)  # where no value has a weight
    log_p, log_q = (
        each.gather(-1, value.unsqueeze(-1)).squeeze(-1) for each in (log_p, log_q + chance)
    )
    number = torch.arange(len(value), device=value.device)
    return (log_p, log_q), value * len(value) + number.reshape(-1, *[1] * (value.dim() - 1))


def resampled_index(log_weights: Tensor, count: int, plates: Sequence[str]) -> Tensor:
    """Return ``[count, *plates]`` indices of draws by their ``[S, *plates]`` weights, smoothed.

    They are drawn with replacement, each entry of the plates on its own.
    """
    dead = (~log_weights.amax(0).isfinite()).nonzero()
    if len(dead):
        raise ValueError(
            f"None of {len(log_weights)} draws of the guide has a weight, at "
            f"{tuple(dead[0].tolist())} of plates {list(plates)}."
        )
    weights = psis(log_weights).log_weights
    columns = weights.flatten(1).T if weights.dim() > 1 else weights.unsqueeze(0)
    index = torch.multinomial(columns.softmax(-1), count, replacement=True)
    return index.T.reshape(count, *log_weights.shape[1:])


@sampling()
def predictive_draws(
    model: Callable,
    draws: Draws,
    *args: Any,
    chunk_size: int | None = None,
    vectorize_particles: bool | str = True,
    **kwargs: Any,
) -> Draws:
    """Draw the data of a model anew for each draw of its latents: the posterior predictive.

    The model is called as in training, or without its data (``y=None``), and draws what it would
    observe, masked entries too. A site that depends on data gets the drawn data if it uses what
    `pyro.sample` returned, and the given data if it uses the model's argument. Latents that
    ``draws`` lacks are drawn from the model. For new rows see `predict`.

    Returns:
        Sites that are observed, or without draws: ``[S, *plates, *event]``-dim tensors.

    Raises:
        ValueError: a plate of latents has another size than in the draws.

    >>> import pyro, pyro.distributions as dist
    >>> pyro.set_rng_seed(0)
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("z", dist.Normal(x.mean(), len(x) ** -0.5))
    >>> draws = posterior_draws(model, guide, torch.tensor([4.0, 6.0]), num_draws=5000)
    >>> new = predictive_draws(model, draws, torch.zeros(3))["x"]
    >>> new.shape, round(new.mean().item(), 1)
    (torch.Size([5000, 3]), 5.0)
    """
    check_at_least(1, chunk_size=chunk_size)

    def new(runs: ModelRuns) -> dict[str, SiteDraws]:
        lacking = runs.each(lambda site: is_latent(site) and site["name"] not in draws.sites)
        return {**lacking, **_data(runs)}

    run = chunk_size, vectorize_particles
    found = run_on_draws(model, args, kwargs, draws, new, *run, draws_data=True)
    return Draws(found, len(draws), minibatch=draws.minibatch)


@sampling()
def log_likelihoods(
    model: Callable,
    draws: Draws,
    *args: Any,
    chunk_size: int | None = None,
    vectorize_particles: bool | str = True,
    **kwargs: Any,
) -> Draws:
    """Return the log-likelihood of each datum in nats, for each draw of the model's latents.

    For every observed site and factor ``found["x"]``, a ``[S, *plates]``-dim tensor without scales,
    nan where masked. Enumerated latents are summed out: all data under one sum have one joint value
    ``found["x1+x2"]``, for each entry of the plates around all that is summed. ``found.scaled``
    names the sites, latent ones too, that have a scale of the user's own (`poutine.scale`): their
    posterior is a tempered one.

    Raises:
        ValueError: the draws are those of other data, or lack a latent.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> draws = prior_draws(model, torch.zeros(3), num_draws=4)
    >>> found = log_likelihoods(model, draws, torch.zeros(3))["x"]
    >>> bool(torch.allclose(found[:, 0], dist.Normal(draws["z"], 1.0).log_prob(torch.zeros(4))))
    True
    """
    check_at_least(1, chunk_size=chunk_size)
    scaled: dict[str, None] = {}
    factors: dict[str, None] = {}
    kept = {name: site for name, site in draws.sites.items() if name not in draws.summed}

    def collect(runs: ModelRuns) -> dict[str, SiteDraws]:
        if missing := sorted(runs.latents().keys() - draws.sites.keys()):
            raise ValueError(
                f"There are no draws of {missing}, only of {[*draws.sites]}. Draw all latents, as "
                "posterior_draws does."
            )
        scaled.update(dict.fromkeys(scaled_sites(runs.single)))
        found, of_factors = summed_log_likelihoods(runs)
        factors.update(dict.fromkeys(of_factors))
        return found

    run = model, args, kwargs, replace(draws, sites=kept), collect, chunk_size, vectorize_particles
    of_run = Draws(run_on_draws(*run, enumerates=True), len(draws), minibatch=draws.minibatch)
    return replace(of_run, scaled=tuple(scaled), factors=tuple(factors))


def observed_data(model: Callable, draws: Draws, *args: Any, **kwargs: Any) -> Draws:
    """Return the data of a model as one draw, ``[1, *plates, *event]``, on the draws' minibatch."""
    return Draws(run_on_draws(model, args, kwargs, replace(draws, count=1), _data), 1)


@sampling()
def prior_draws(
    model: Callable,
    *args: Any,
    num_draws: int = 1000,
    minibatch: poutine.Trace | None = None,
    chunk_size: int | None = None,
    vectorize_particles: bool | str = True,
    **kwargs: Any,
) -> Draws:
    """Draw all sites of a model from the model: prior and prior predictive.

    The model is called as in training, with its data, which are drawn instead of observed:
    ``of_kind("observed")``. ``minibatch`` has subsample sites to draw for (`Draws.minibatch`).

    >>> import pyro, pyro.distributions as dist
    >>> pyro.set_rng_seed(0)
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z, 4.0), obs=x)
    >>> draws = prior_draws(model, torch.zeros(2), num_draws=5000)
    >>> draws["x"].shape, round(draws["x"].std().item())
    (torch.Size([5000, 2]), 5)
    """
    check_at_least(1, num_draws=num_draws, chunk_size=chunk_size)
    if minibatch is None:
        with poutine.block(), torch.no_grad():
            minibatch = subsample_sites(poutine.trace(model).get_trace(*args, **kwargs))
    empty = Draws({}, num_draws, minibatch=minibatch)
    run = chunk_size, vectorize_particles
    found = run_on_draws(model, args, kwargs, empty, _everything, *run, draws_data=True)
    return replace(empty, sites=found)


def _everything(runs: ModelRuns) -> dict[str, SiteDraws]:
    return {**runs.latents(), **runs.computed(), **_data(runs)}


def _data(runs: ModelRuns) -> dict[str, SiteDraws]:
    """Return the data, or what the model drew in their place; factors have none."""
    return runs.each(lambda site: was_observed(site) or can_be_drawn(site), "observed")
