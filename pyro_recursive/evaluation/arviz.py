"""A fitted guide, or a Markov chain, as one ArviZ object; and its leave-one-out cross-validation.

Importing this module imports ArviZ, which takes seconds; importing `pyro_recursive` does not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_recursive.evaluation.calls import sampling
from pyro_recursive.evaluation.chains import Chains, chain_draws
from pyro_recursive.evaluation.draws import Draws, SiteDraws
from pyro_recursive.evaluation.leave_one_out import (
    CELL,
    FACTORS,
    OLD,
    SCALED,
    SUMMED,
    UNWEIGHTED,
    ArvizData,
    az,
    loo,
)
from pyro_recursive.evaluation.predictions import (
    log_likelihoods,
    observed_data,
    posterior_draws,
    predictive_draws,
    prior_draws,
)

__all__ = ["loo", "mcmc_to_arviz", "to_arviz"]


@sampling()
def to_arviz(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_draws: int = 1000,
    resample: str | None = None,
    num_proposals: int | None = None,
    posterior_predictive: bool = True,
    prior_predictive: bool = False,
    log_likelihood: bool = True,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    chunk_size: int | None = None,
    max_plate_nesting: float = math.inf,
    vectorize_particles: bool | str = True,
    **kwargs: Any,
) -> ArvizData:
    """Return draws from a guide as an ArviZ object: ``InferenceData`` (0.2x) or ``DataTree`` (1.x).

    Dims are (chain, draw, plates by name, event dims), with one chain. What each group holds: `Is
    the guide any good?` of the documentation. Pass results of `loo`, not these objects, to
    ``az.compare``: ArviZ's own LOO is not corrected for the guide.

    Args:
        posterior_predictive, prior_predictive, log_likelihood: whether to include these groups.
        coords: values of dims; of a plate for all its entries, or for those of the minibatch.
        dims: names of the event dims of sites, from left to right.
        num_draws, resample, num_proposals, chunk_size, max_plate_nesting, vectorize_particles: as
            in `posterior_draws`.

    Raises:
        ValueError: names or numbers of dims do not fit; and as `posterior_draws` does.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     with pyro.plate("person", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z[..., None], torch.ones(2)).to_event(1), obs=x)
    >>> guide = pyro.infer.autoguide.AutoNormal(model)
    >>> data = to_arviz(model, guide, torch.zeros(3, 2), dims={"x": ["side"]})
    >>> dict(data["posterior_predictive"]["x"].sizes)
    {'chain': 1, 'draw': 1000, 'person': 3, 'side': 2}
    """
    run: dict[str, Any] = {"chunk_size": chunk_size, "vectorize_particles": vectorize_particles}
    how = {"num_draws": num_draws, "resample": resample, "num_proposals": num_proposals, **run}
    draws = posterior_draws(
        model, guide, *args, max_plate_nesting=max_plate_nesting, **how, **kwargs
    )
    labels = Labels(draws, coords or {}, dims or {})
    wanted = posterior_predictive, prior_predictive, log_likelihood
    groups = _groups((model, args, kwargs, run), draws, labels, *wanted)
    return _container({**groups, "sample_stats": _stats(draws, labels)}, labels)


@sampling()
def mcmc_to_arviz(
    mcmc: Chains,
    model: Callable,
    *args: Any,
    posterior_predictive: bool = True,
    prior_predictive: bool = False,
    log_likelihood: bool = True,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    chunk_size: int | None = None,
    vectorize_particles: bool | str = True,
    **kwargs: Any,
) -> ArvizData:
    """Return the draws of a Pyro MCMC run in the form of `to_arviz`, to compare a guide with them.

    ``sample_stats`` has ``diverging`` if the kernel records it. The model and its arguments are
    those of the run ``mcmc``; latents that it sums out are drawn given the others. Other options
    and errors as in `to_arviz`.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> kernel = pyro.infer.NUTS(model)
    >>> mcmc = pyro.infer.MCMC(kernel, num_samples=20, warmup_steps=5, disable_progbar=True)
    >>> mcmc.run(torch.zeros(3))
    >>> dict(mcmc_to_arviz(mcmc, model, torch.zeros(3))["log_likelihood"]["x"].sizes)
    {'chain': 1, 'draw': 20, 'data': 3}
    """
    run: dict[str, Any] = {"chunk_size": chunk_size, "vectorize_particles": vectorize_particles}
    draws, chains = chain_draws(mcmc, model, args, kwargs, run)
    labels = Labels(draws, coords or {}, dims or {}, chains)
    wanted = posterior_predictive, prior_predictive, log_likelihood
    groups = _groups((model, args, kwargs, run), draws, labels, *wanted)
    diverged = mcmc.diagnostics().get("divergences")
    if diverged is not None:
        diverging = torch.zeros(chains, len(draws) // chains, dtype=torch.bool)
        for chain in range(chains):
            diverging[chain, list(diverged[f"chain {chain}"])] = True
        groups["sample_stats"] = labels.numbers({"diverging": diverging.flatten()}, ())
    return _container(groups, labels)


def _groups(
    call: tuple[Callable, tuple, dict[str, Any], dict[str, Any]],
    draws: Draws,
    labels: "Labels",
    predictive: bool,
    prior: bool,
    log_likelihood: bool,
) -> dict[str, xr.Dataset]:
    """Return the groups of an ArviZ object, without the statistics of the draws."""
    model, args, kwargs, run = call
    draws = draws.of_this_call()
    found = {"posterior": labels.draws(draws.of_kind("latent", "computed"))}
    for name in draws.summed:
        found["posterior"][name].attrs[SUMMED] = 1
    if predictive:
        new = predictive_draws(model, draws, *args, **run, **kwargs)
        found["posterior_predictive"] = labels.draws(new.sites)
    if log_likelihood:
        new = log_likelihoods(model, draws, *args, **run, **kwargs)
        attributes: dict[str, Any] = {SCALED: ", ".join(new.scaled)} if new.scaled else {}
        if new.factors:
            attributes[FACTORS] = list(new.factors)
        group = labels.draws(new.sites).assign_attrs(attributes)
        for name, site in new.sites.items():
            if site.cell:
                group[name].attrs[CELL] = ", ".join(f"{p}={i}" for p, i in site.cell.items())
        found["log_likelihood"] = group
    if prior:
        options = {"num_draws": len(draws), "minibatch": draws.minibatch, **run}
        new = prior_draws(model, *args, **options, **kwargs)
        found["prior"] = labels.draws(new.of_kind("latent", "computed"))
        found["prior_predictive"] = labels.draws(new.of_kind("observed"))
    found["observed_data"] = labels.data(observed_data(model, draws, *args, **kwargs).sites)
    return {name: group for name, group in found.items() if group.data_vars}


def _stats(draws: Draws, labels: "Labels") -> xr.Dataset:
    """Return the densities of draws from a guide; nan for the weights of draws without them."""
    if draws.log_p is None or draws.log_q is None:
        missing = labels.numbers({"log_weight": torch.full((len(draws),), math.nan)}, ())
        return missing.assign_attrs({UNWEIGHTED: draws.unweighted})
    stats = {"log_p": draws.log_p, "log_q": draws.log_q}
    if not draws.resampled:
        stats["log_weight"] = draws.log_weights
    return labels.numbers(stats, draws.plates)


class Labels:
    """Makes labelled arrays of draws, ``[chain, draw, *plates, *event]``."""

    def __init__(
        self,
        draws: Draws,
        coords: Mapping[str, Sequence],
        dims: Mapping[str, Sequence[str]],
        chains: int = 1,
    ) -> None:
        self.coords, self.dims, self.chains = coords, dims, chains
        subsamples = draws.whole_minibatch.nodes
        self.sizes = {name: site["fn"].size for name, site in subsamples.items()}
        self.index = {
            name: site["value"].tolist()
            for name, site in subsamples.items()
            if _is_index(site["value"], self.sizes[name])
        }

    def draws(self, found: Mapping[str, SiteDraws]) -> xr.Dataset:
        return self._dataset({n: (self._names(n, s), s.value) for n, s in found.items()})

    def data(self, found: Mapping[str, SiteDraws]) -> xr.Dataset:
        """Return the first draw of sites, without dims of chain and draw."""
        names = {name: self._names(name, site) for name, site in found.items()}
        return self._dataset({n: (names[n], s.value) for n, s in found.items()}, ())

    def numbers(self, values: Mapping[str, Tensor], plates: Sequence[str]) -> xr.Dataset:
        """Return numbers of each draw, ``[S, *plates]``."""
        return self._dataset({name: (tuple(plates), value) for name, value in values.items()})

    def check_used(self, groups: Mapping[str, xr.Dataset]) -> None:
        known = {str(dim) for group in groups.values() for dim in group.dims}
        wanted = {*self.coords, *(name for names in self.dims.values() for name in names)}
        if unknown := sorted(wanted - known):
            raise ValueError(f"coords or dims name {unknown}; the dims are {sorted(known)}.")

    def _names(self, name: str, site: SiteDraws) -> tuple[str, ...]:
        count = len(site.event_shape)
        default = tuple(f"{name}_dim_{i}" for i in range(count))
        names = (*site.plates, *(self.dims.get(name, default) if count else ()))
        if len(names) != len(site.plates) + count or len(set(names)) < len(names):
            raise ValueError(f"Site '{name}' has {count} event dims; its names are {list(names)}.")
        return names

    def _dataset(
        self,
        tensors: Mapping[str, tuple[tuple[str, ...], Tensor]],
        sample: tuple[str, ...] = ("chain", "draw"),
    ) -> xr.Dataset:
        arrays: dict[str, tuple] = {}
        sizes: dict[str, int] = {}
        for name, (dims, tensor) in tensors.items():
            tensor = tensor.unflatten(0, (self.chains, -1)) if sample else tensor[0]
            arrays[name] = ((*sample, *dims), tensor.detach().cpu().numpy())
            sizes.update(zip((*sample, *dims), tensor.shape, strict=True))
        coords = {dim: self._coord(dim, size) for dim, size in sizes.items()}
        return xr.Dataset(arrays, coords, attrs={"inference_library": "pyro_recursive"})

    def _coord(self, dim: str, size: int) -> Any:
        index, values = self.index.get(dim, range(size)), self.coords.get(dim)
        if values is None:
            return np.asarray(index)
        is_whole = dim in self.index and len(values) == self.sizes[dim]
        return [values[i] for i in index] if is_whole else list(values)


def _is_index(value: Any, size: int) -> bool:
    """Whether a plate's subsample are indices: ``pyro.plate(..., subsample=x)`` may have data."""
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype is not torch.long:
        return False
    inside = bool(((value >= 0) & (value < size)).all())
    return inside and len(value.unique()) == len(value)


def _container(groups: Mapping[str, xr.Dataset], labels: Labels) -> ArvizData:
    labels.check_used(groups)
    return az.InferenceData(**groups) if OLD else xr.DataTree.from_dict(dict(groups))
