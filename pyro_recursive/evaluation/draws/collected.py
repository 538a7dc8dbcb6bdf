"""What is gathered of a model's runs: values of one kind of site, or log-likelihoods."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_recursive.evaluation.draws.drawn import Kind, SiteDraws, computed, drawn
from pyro_recursive.evaluation.draws.model_runs import Run, is_computed, is_factor, was_observed
from pyro_recursive.tracing.compatibility import check_batch_shape
from pyro_recursive.tracing.densities import log_prob_of
from pyro_recursive.tracing.sites import Site, sites

__all__ = ["computed_values", "data_values", "latent_values", "log_likelihood_values"]


def latent_values(run: Run) -> dict[str, SiteDraws]:
    """Return the values of the latent sites."""
    return {
        site["name"]: _values(run, site["name"], "latent")
        for site in sites(run.traces[0])
        if not site["is_observed"] and not was_observed(site)
    }


def data_values(run: Run) -> dict[str, SiteDraws]:
    """Return the data, or what the model drew in its place; factors have none."""
    return {
        site["name"]: _values(run, site["name"], "observed")
        for site in sites(run.traces[0])
        if was_observed(site) or (_is_data(site) and not is_factor(site))
    }


def computed_values(run: Run) -> dict[str, SiteDraws]:
    """Return the values of the deterministic sites."""
    return {
        name: computed(_at(run, name), run.outline.nodes[name], run.particles, run.nesting)
        for name, site in run.traces[0].nodes.items()
        if is_computed(site)
    }


def log_likelihood_values(run: Run) -> dict[str, SiteDraws]:
    """Return the log-densities of observed sites and factors: no scale, nan where masked."""
    found = {}
    for site in sites(run.traces[0]):
        if _is_data(site):
            group = _at(run, site["name"])
            values = [_log_likelihood(one) for one in group]
            found[site["name"]] = drawn(group, values, 0, run.particles, run.nesting, "observed")
    return found


def _is_data(site: Site) -> bool:
    return site["is_observed"] and not is_computed(site)


def _values(run: Run, name: str, kind: Kind) -> SiteDraws:
    group = _at(run, name)
    values = [site["value"] for site in group]
    return drawn(group, values, group[0]["fn"].event_dim, run.particles, run.nesting, kind)


def _at(run: Run, name: str) -> Sequence[Site]:
    """Return the site in each of the traces, which must all have it."""
    for trace in run.traces:
        if name not in trace.nodes:
            raise ValueError(
                f"Site '{name}' is in some runs of the model and not in others, so that its draws "
                "make no tensor. Sample it in every run, under a mask where it is not needed."
            )
    return [trace.nodes[name] for trace in run.traces]


def _log_likelihood(site: Site) -> Tensor:
    log_prob = log_prob_of(site, site["fn"])
    check_batch_shape(site, log_prob.shape)
    fn, masks = site["fn"], [site["mask"]]
    # A mask inside an event leaves out a part of the entry, which still has a density.
    while isinstance(fn, dist.MaskedDistribution):
        fn, masks = fn.base_dist, [*masks, fn._mask]
    for mask in masks:
        if mask is not None:
            seen = torch.as_tensor(mask, device=log_prob.device)
            log_prob = torch.where(seen, log_prob, torch.nan)
    return log_prob
