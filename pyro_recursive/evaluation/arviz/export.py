"""Everything about a fitted guide, or a Markov chain, as one ArviZ object.

Importing this file imports ArviZ, which takes seconds: the rest of the package does not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr

from pyro_recursive.evaluation.arviz.labels import Entries, Labels, entries_of
from pyro_recursive.evaluation.arviz.loo import SCALED, UNWEIGHTED, loo
from pyro_recursive.evaluation.arviz.versions import container
from pyro_recursive.evaluation.draws.markov import chain_draws, divergences
from pyro_recursive.evaluation.draws.posterior import Draws, Resample, posterior_draws
from pyro_recursive.evaluation.draws.predictive import (
    log_likelihoods,
    observed_data,
    predictive_draws,
    prior_draws,
)

__all__ = ["loo", "mcmc_to_arviz", "to_arviz"]


def to_arviz(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 1000,
    resample: Resample | None = None,
    num_proposals: int | None = None,
    posterior_predictive: bool = True,
    prior_predictive: bool = False,
    log_likelihood: bool = True,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    chunk_size: int | None = None,
    max_plate_nesting: float = math.inf,
    vectorize_particles: bool = True,
    **kwargs: Any,
) -> Any:
    """Return draws from a guide as an ArviZ object, with all that ArviZ wants to know of a model.

    An ``InferenceData`` in ArviZ 0.2x, a ``DataTree`` in 1.x; both are read as
    ``data["posterior"]["z"]``. Dims are (chain, draw, plates by name, event dims), with one chain.

    - ``posterior``: latent and deterministic sites (`posterior_draws`), resampled where asked for;
    - ``posterior_predictive``: data drawn from the model for each of these (`predictive_draws`);
    - ``log_likelihood``: of each datum in nats, without scales, nan where masked;
    - ``observed_data``: the data;
    - ``prior``, ``prior_predictive``: draws from the model alone, on request (`prior_draws`);
    - ``sample_stats``: ``log_p`` = log p(x, z) and ``log_q`` = log q(z) in nats, for each entry of
      the plates that enclose every sample site; and their difference ``log_weight``, unless draws
      were resampled by it. Where a guide has no density, or one with a scale of the user's own, or
      a subsampled plate does not enclose every site, a ``log_weight`` of nan alone.

    **ArviZ's own** ``az.loo`` **and** ``az.compare`` **of the object are not corrected for the
    guide: pass** `loo` **of the objects to** ``az.compare``.

    The model is called as in training, with its data; it needs no ``obs=None``. A keyword of the
    model that has the name of one here cannot be passed: wrap the model. Where a plate is
    subsampled, everything is about one minibatch, and the coordinates of the plate are its indices;
    0, 1, ... where an argument of the call is the ``subsample=``, which may be the data themselves.

    :param coords: values of dims; those of a plate for all its entries, or for the minibatch's
        (only these, where the call does not tell the indices)
    :param dims: names of the event dims of sites, from left to right; plates are named already
    :raises ValueError: as `posterior_draws` does; names or numbers of dims do not fit

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("person", len(x)):
    ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
    ...         pyro.sample("x", dist.Normal(z[..., None], torch.ones(2)).to_event(1), obs=x)
    >>> guide = pyro.infer.autoguide.AutoNormal(model)
    >>> names = {"person": ["Ann", "Ben", "Cem"]}
    >>> data = to_arviz(model, guide, torch.zeros(3, 2), coords=names, dims={"x": ["side"]})
    >>> dict(data["posterior_predictive"]["x"].sizes)
    {'chain': 1, 'draw': 1000, 'person': 3, 'side': 2}
    >>> float(data["observed_data"]["x"].sel(person="Ben", side=0))
    0.0
    """
    run: dict[str, Any] = {"chunk_size": chunk_size, "vectorize_particles": vectorize_particles}
    call = _Call(model, args, kwargs, run)
    draws = posterior_draws(
        model,
        guide,
        *args,
        num_draws=num_draws,
        resample=resample,
        num_proposals=num_proposals,
        max_plate_nesting=max_plate_nesting,
        **run,
        **kwargs,
    )
    labels = Labels(coords or {}, dims or {}, call.entries(draws))
    groups = call.groups(draws, labels, posterior_predictive, prior_predictive, log_likelihood)
    groups["sample_stats"] = _stats(draws, labels)
    labels.check_used(groups)
    return container(groups)


def mcmc_to_arviz(
    mcmc: Any,
    model: Callable,
    *args: Any,
    posterior_predictive: bool = True,
    prior_predictive: bool = False,
    log_likelihood: bool = True,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    chunk_size: int | None = None,
    vectorize_particles: bool = True,
    **kwargs: Any,
) -> Any:
    """Return the draws of a Pyro MCMC run in the shape of `to_arviz`, to compare a guide with them.

    The same groups, dims and arguments; ``sample_stats`` has ``diverging``, where the kernel tells.
    It works in ArviZ 0.2x and 1.x, which has no ``from_pyro``.

    :param mcmc: a ``pyro.infer.MCMC`` that has run
    :param model: its model; args and kwargs are those of the run
    :raises ValueError: the run has no draws of a latent site (a summed-out discrete one, say)

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> kernel = pyro.infer.NUTS(model)
    >>> mcmc = pyro.infer.MCMC(kernel, num_samples=20, warmup_steps=5, disable_progbar=True)
    >>> mcmc.run(torch.zeros(3))
    >>> data = mcmc_to_arviz(mcmc, model, torch.zeros(3))
    >>> dict(data["log_likelihood"]["x"].sizes)
    {'chain': 1, 'draw': 20, 'data': 3}
    """
    run: dict[str, Any] = {"chunk_size": chunk_size, "vectorize_particles": vectorize_particles}
    call = _Call(model, args, kwargs, run)
    options = {"chunk_size": chunk_size, "vectorize": vectorize_particles}
    draws, chains = chain_draws(mcmc, model, args, kwargs, options)
    labels = Labels(coords or {}, dims or {}, call.entries(draws), chains)
    groups = call.groups(draws, labels, posterior_predictive, prior_predictive, log_likelihood)
    diverging = divergences(mcmc, chains, len(draws) // chains)
    if diverging is not None:
        groups["sample_stats"] = labels.numbers({"diverging": diverging}, ())
    labels.check_used(groups)
    return container(groups)


def _stats(draws: Draws, labels: Labels) -> xr.Dataset:
    """Return the densities of draws from a guide; nan in the place of weights, if it has none."""
    if draws.log_p is None or draws.log_q is None:
        missing = labels.numbers({"log_weight": torch.full((len(draws),), math.nan)}, ())
        return missing.assign_attrs({UNWEIGHTED: draws.unweighted})
    stats = {"log_p": draws.log_p, "log_q": draws.log_q}
    if not draws.resampled:
        stats["log_weight"] = draws.log_weights
    return labels.numbers(stats, draws.plates)


@dataclass(frozen=True)
class _Call:
    """A model with the arguments of a call, and how its samples are run."""

    model: Callable
    args: tuple
    kwargs: dict[str, Any]
    run: dict[str, Any]

    def groups(
        self, draws: Draws, labels: Labels, predictive: bool, prior: bool, log_likelihood: bool
    ) -> dict[str, xr.Dataset]:
        """Return the groups of an ArviZ object, but for the statistics of the draws."""
        draws = draws.of_this_call()
        found = {"posterior": labels.draws(draws.of_kind("latent", "computed"))}
        if predictive:
            new = self._of(predictive_draws, draws)
            found["posterior_predictive"] = labels.draws(new.sites)
        if log_likelihood:
            found["log_likelihood"] = self._log_likelihood(draws, labels)
        if prior:
            options = {"num_draws": len(draws), "minibatch": draws.minibatch, **self.run}
            new = prior_draws(self.model, *self.args, **options, **self.kwargs)
            found["prior"] = labels.draws(new.of_kind("latent", "computed"))
            found["prior_predictive"] = labels.draws(new.of_kind("observed"))
        data = observed_data(self.model, draws, *self.args, **self.kwargs)
        found["observed_data"] = labels.first(data.sites)
        return {name: group for name, group in found.items() if group.data_vars}

    def entries(self, draws: Draws) -> dict[str, Entries]:
        """Return which entries of its plates the call is about."""
        return entries_of(draws.whole_minibatch, self.args, self.kwargs)

    def _log_likelihood(self, draws: Draws, labels: Labels) -> xr.Dataset:
        found = self._of(log_likelihoods, draws)
        group = labels.draws(found.sites)
        return group.assign_attrs({SCALED: ", ".join(found.scaled)}) if found.scaled else group

    def _of(self, function: Callable[..., Draws], draws: Draws) -> Draws:
        return function(self.model, draws, *self.args, **self.run, **self.kwargs)
