"""What a model says of data: predictive draws, prior draws, log-likelihoods of each datum."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine

from pyro_recursive.evaluation.draws.collected import (
    computed_values,
    data_values,
    latent_values,
    log_likelihood_values,
)
from pyro_recursive.evaluation.draws.drawn import SiteDraws
from pyro_recursive.evaluation.draws.model_runs import Run, drawing_data, was_observed
from pyro_recursive.evaluation.draws.own_scales import scaled_sites
from pyro_recursive.evaluation.draws.posterior import Draws, collected
from pyro_recursive.tracing.arguments import check_at_least
from pyro_recursive.tracing.program import Program, structure_of
from pyro_recursive.tracing.sites import subsample_sites

__all__ = ["log_likelihoods", "observed_data", "predictive_draws", "prior_draws"]


def predictive_draws(
    model: Callable,
    draws: Draws,
    *args: Any,
    chunk_size: int | None = None,
    vectorize_particles: bool = True,
    **kwargs: Any,
) -> Draws:
    """Draw the data of a model anew, for each draw of its latents: the posterior predictive.

    The model is called as in training, with its data: what it observes is drawn from the model
    instead. Sites further down get the drawn data where they use what `pyro.sample` returned, and
    the given data where they use the model's argument (then a prediction one step ahead). Masked
    entries are drawn, too. Data of another size may be passed where the latents are in no plate of
    the data. Latents that ``draws`` has not are drawn from the model.

    :return: ``draws["x"]`` is ``[S, *plates, *event]``
    :raises ValueError: a plate of latents has another size here

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_recursive.evaluation.draws import posterior_draws
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
    program = Program(drawing_data(model), model, args, kwargs)
    run = {"vectorize": vectorize_particles, "chunk_size": chunk_size}
    with torch.no_grad():
        found = collected(program, draws, data_values, run)
    return Draws(found, len(draws), minibatch=draws.minibatch)


def log_likelihoods(
    model: Callable,
    draws: Draws,
    *args: Any,
    chunk_size: int | None = None,
    vectorize_particles: bool = True,
    **kwargs: Any,
) -> Draws:
    """Return the log-likelihood of each datum in nats, for each draw of the model's latents.

    ``found["x"]`` is ``[S, *plates]``, for every observed site and every factor, without any scale;
    masked entries are nan. ``found.scaled`` names the model's sites, latent ones too, that have a
    scale of the user's own (`poutine.scale`): their posterior is a tempered one.

    :raises ValueError: the draws are those of other data; a latent is missing in them

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_recursive.evaluation.draws import posterior_draws
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> x = torch.tensor([0.0, 1.0, 2.0])
    >>> draws = posterior_draws(model, guide, x, num_draws=4)
    >>> found = log_likelihoods(model, draws, x)["x"]
    >>> bool(torch.allclose(found, dist.Normal(draws["z"][:, None], 1.0).log_prob(x)))
    True
    """
    check_at_least(1, chunk_size=chunk_size)
    program = Program(model, model, args, kwargs)
    run = {"vectorize": vectorize_particles, "chunk_size": chunk_size}
    scaled: dict[str, None] = {}

    def collect(run: Run) -> dict[str, SiteDraws]:
        _check_latents(run, draws)
        scaled.update(dict.fromkeys(scaled_sites(run.outline)))
        return log_likelihood_values(run)

    with torch.no_grad():
        found = collected(program, draws, collect, run)
    return Draws(found, len(draws), minibatch=draws.minibatch, scaled=tuple(scaled))


def observed_data(model: Callable, draws: Draws, *args: Any, **kwargs: Any) -> Draws:
    """Return what a model observes, as one draw: ``found["x"]`` is ``[1, *plates, *event]``.

    :param draws: draws of the model's latents; they know the minibatch, where there is one

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
    >>> observed_data(model, Draws({}, 1), torch.tensor([0.0, 1.0]))["x"].tolist()
    [[0.0, 1.0]]
    """
    program = Program(model, model, args, kwargs)
    with torch.no_grad():
        return Draws(collected(program, replace(draws, count=1), data_values, {}), 1)


def prior_draws(
    model: Callable,
    *args: Any,
    num_draws: int = 1000,
    minibatch: poutine.Trace | None = None,
    chunk_size: int | None = None,
    vectorize_particles: bool = True,
    **kwargs: Any,
) -> Draws:
    """Draw all sites of a model, its data too, from the model: prior and prior predictive.

    The model is called as in training, with its data, which is drawn instead of observed.
    ``of_kind("observed")`` are the data, ``of_kind("latent", "computed")`` the rest.

    :param minibatch: the subsample sites to draw for (`Draws.minibatch`); by default drawn, too
    :raises ValueError: a number is out of range; samples would be mixed in one pass

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
    drawing = drawing_data(model)
    if vectorize_particles and num_draws > 1:
        _check_mixing(model, poutine.block(drawing, hide_fn=_is_data), args, kwargs)
    program = Program(drawing, drawing, args, kwargs)
    with torch.no_grad():
        kept = _minibatch(program) if minibatch is None else minibatch
        empty = Draws({}, num_draws, minibatch=kept)
        run = {"vectorize": vectorize_particles, "chunk_size": chunk_size}
        found = collected(program, empty, _all_values, run)
    return replace(empty, sites=found)


def _check_mixing(model: Callable, prior: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise where samples would be mixed in one pass.

    The data must be observed for it: drawn data move along, so that their density says nothing.
    """
    mixing = structure_of(Program(model, prior, args, kwargs)).mixing
    if mixing is not None:
        raise ValueError(
            f"The density of one sample depends on the value of '{mixing}' in another, when all "
            "run in one pass. Count dims from the right (z.sum(-1), z[..., 0]), or use "
            "vectorize_particles=False."
        )


def _check_latents(run: Run, draws: Draws) -> None:
    """Refuse a model with latents that the draws have not: it would draw them from the prior."""
    missing = latent_values(run).keys() - draws.sites.keys()
    if missing:
        raise ValueError(
            f"There are no draws of the latent sites {sorted(missing)}, but of "
            f"{[*draws.sites]}: the log-likelihood needs all of them."
        )


def _all_values(run: Run) -> dict[str, SiteDraws]:
    return {**latent_values(run), **computed_values(run), **data_values(run)}


def _minibatch(program: Program) -> poutine.Trace:
    """Draw the minibatch of a model."""
    with poutine.block():
        trace = poutine.trace(program.model).get_trace(*program.args, **program.kwargs)
    return subsample_sites(trace)


def _is_data(site: Any) -> bool:
    return site["type"] == "sample" and (site["is_observed"] or was_observed(site))
