"""The draws of a Pyro MCMC run as `Draws`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_recursive.evaluation.draws.collected import computed_values
from pyro_recursive.evaluation.draws.drawn import SiteDraws, drawn
from pyro_recursive.evaluation.draws.posterior import Draws, collected
from pyro_recursive.tracing.isolation import outline
from pyro_recursive.tracing.plates import Particles
from pyro_recursive.tracing.program import Program
from pyro_recursive.tracing.sites import Site, nesting_of, sites, subsample_sites

__all__ = ["chain_draws", "divergences"]


def chain_draws(
    mcmc: Any, model: Callable, args: tuple, kwargs: dict[str, Any], options: dict[str, Any]
) -> tuple[Draws, int]:
    """Return the draws of all chains, one after the other, and the number of chains.

    :param options: those of `runs_of_model`
    :raises ValueError: a latent site has no draws
    """
    samples = mcmc.get_samples(group_by_chain=True)
    chains, count = next(iter(samples.values())).shape[:2]
    single = outline(model, args, kwargs)
    particles = Particles(1, chains * count, dim=-nesting_of(single) - 1)
    latents = {
        site["name"]: _drawn(site, samples, particles)
        for site in sites(single)
        if not site["is_observed"]
    }
    draws = Draws(latents, chains * count, whole_minibatch=subsample_sites(single))
    program = Program(model, model, args, kwargs)
    with torch.no_grad():
        found = collected(program, draws.of_this_call(), computed_values, options)
    return replace(draws, sites={**latents, **found}), chains


def _drawn(site: Site, samples: Mapping[str, Tensor], particles: Particles) -> SiteDraws:
    if site["name"] not in samples:
        raise ValueError(
            f"The MCMC run has no draws of latent site '{site['name']}', but of {[*samples]}: it "
            "ran on another model, or summed the site out. Draw it with "
            "pyro.infer.infer_discrete, and condition the model on it."
        )
    value, event_dim = samples[site["name"]].flatten(0, 1), site["fn"].event_dim
    nesting = -1 - (particles.dim or 0)
    padding = (1,) * (nesting + 1 + event_dim - value.dim())
    value = value.reshape(len(value), *padding, *value.shape[1:])
    return drawn([site], [value], event_dim, particles, nesting)


def divergences(mcmc: Any, chains: int, count: int) -> Tensor | None:
    """Return which draws diverged, ``[chains * count]``, None where the kernel does not tell."""
    found = mcmc.diagnostics().get("divergences")
    if found is None:
        return None
    diverging = torch.zeros(chains, count, dtype=torch.bool)
    for number in range(chains):
        diverging[number, list(found[f"chain {number}"])] = True
    return diverging.flatten()
