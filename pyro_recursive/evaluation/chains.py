"""Draws of Markov chains as draws of a model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pyro_recursive.evaluation.draws import Draws, stacked
from pyro_recursive.evaluation.enumerated import with_enumerated
from pyro_recursive.evaluation.model_runs import ModelRuns, enumerated_without, run_on_draws
from pyro_recursive.tracing.isolation import outline
from pyro_recursive.tracing.sites import latent_sites, nesting_of, subsample_sites


@runtime_checkable
class Chains(Protocol):
    """The draws of Markov chains, as in `pyro.infer.MCMC`."""

    def get_samples(self, *, group_by_chain: bool) -> dict[str, Tensor]:
        """Return the draws of each site, ``[chains, draws, *value]``."""

    def diagnostics(self) -> dict[str, Any]:
        """Return what the kernel has recorded."""


def chain_draws(
    mcmc: Chains, model: Callable, args: tuple, kwargs: dict[str, Any], run: dict[str, Any]
) -> tuple[Draws, int]:
    """Return the draws of all chains, one after the other, and the number of chains.

    ``run`` are options of `run_on_draws`.
    """
    samples = mcmc.get_samples(group_by_chain=True)
    chains, count = next(iter(samples.values())).shape[:2]
    single = outline(model, args, kwargs)
    nesting, latents = nesting_of(single), {}
    summed = enumerated_without(single, samples)
    for site in (site for site in latent_sites(single) if site["name"] not in summed):
        if site["name"] not in samples:
            raise ValueError(f"The MCMC run has no draws of latent site '{site['name']}'.")
        value = samples[site["name"]].flatten(0, 1)
        padding = (1,) * (nesting + 1 + site["fn"].event_dim - value.dim())
        value = value.reshape(len(value), *padding, *value.shape[1:])
        latents[site["name"]] = stacked(site, [value], len(value), nesting)
    minibatch = subsample_sites(single)
    draws = Draws(latents, chains * count, minibatch=minibatch, whole_minibatch=minibatch)
    call = model, args, kwargs
    if summed:
        draws = with_enumerated(*call, draws, **run)
    computed = run_on_draws(*call, draws, ModelRuns.computed, **run)
    return replace(draws, sites={**draws.sites, **computed}), chains
