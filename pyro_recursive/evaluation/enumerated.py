"""Latents that a model enumerates: draws given all others, and likelihoods that sum over them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_recursive.evaluation.draws import Draws, SiteDraws, of_each, stacked
from pyro_recursive.evaluation.model_runs import ModelRuns, is_computed, is_factor, run_on_draws
from pyro_recursive.tracing.compatibility import check_batch_shape, log_prob_of
from pyro_recursive.tracing.conditionals import Conditional, conditionals, draw_enumerated
from pyro_recursive.tracing.enumeration import is_enumerated
from pyro_recursive.tracing.sites import Site, SiteTable, entry_mask_of


def with_enumerated(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    draws: Draws,
    chunk_size: int | None = None,
    vectorize_particles: bool | str = True,
    undrawn: frozenset[str] = frozenset(),
    compile: bool = False,
) -> Draws:
    """Add draws of the latents that a model enumerates, from their posterior given those drawn.

    Sites in ``undrawn`` are missing data; the other options are those of `run_on_draws`.
    """
    collect = partial(_drawn, undrawn=undrawn)
    run = model, args, kwargs, draws, collect, chunk_size, vectorize_particles
    found = run_on_draws(*run, enumerates=True, compile=compile)
    summed = draws.summed | found.keys()
    return replace(draws, sites={**draws.sites, **found}, summed=summed)


def _drawn(runs: ModelRuns, undrawn: frozenset[str]) -> dict[str, SiteDraws]:
    found = [draw_enumerated(table, runs.layout, undrawn) for table in runs.tables()]
    nodes = [trace.nodes for trace in runs.traces]
    return {
        name: stacked(of_each(name, nodes)[0], of_each(name, found), runs.total, runs.nesting)
        for name in dict.fromkeys(name for each in found for name in each)
    }


class _Term(NamedTuple):
    """The log-likelihood of a site, or of several under one sum, and whether they are no data."""

    site: Site
    log_prob: Tensor
    is_factor: bool


def summed_log_likelihoods(runs: ModelRuns) -> tuple[dict[str, SiteDraws], list[str]]:
    """Return log p(x | z) in nats, nan where masked, with enumerated latents summed out.

    One for each observed site, and one for those that are summed together, which has their names
    joined by "+". And the names of those that are of factors alone.
    """
    terms = [{each.site["name"]: each for each in _terms(runs, table)} for table in runs.tables()]
    found, factors = dict[str, SiteDraws](), list[str]()
    for name in dict.fromkeys(name for each in terms for name in each):
        group = of_each(name, terms)
        values = [term.log_prob for term in group]
        found[name] = stacked(group[0].site, values, runs.total, runs.nesting, "observed", 0)
        factors += [name] if group[0].is_factor else []
    return found, factors


def _terms(runs: ModelRuns, table: SiteTable) -> Iterator[_Term]:
    ordinary, summed = table.model, list[Conditional]()
    if is_enumerated(table):
        ordinary, summed = conditionals(table, runs.layout)
    for site in (record.site for record in ordinary):
        if site["is_observed"] and not is_computed(site):
            yield _Term(site, _log_likelihood(site), is_factor(site))
    for each in summed:
        if each.log_likelihood is not None:
            yield _Term(each.site, each.log_likelihood, all(map(is_factor, each.observed)))


def _log_likelihood(site: Site) -> Tensor:
    """Return a site's log-density without scale, nan where a mask leaves out a whole entry."""
    log_prob = log_prob_of(site, site["fn"])
    check_batch_shape(site, log_prob.shape)
    seen = entry_mask_of(site)
    return log_prob if seen is None else torch.where(seen, log_prob, torch.nan)
