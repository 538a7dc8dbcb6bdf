"""What differs between ArviZ 0.2x and 1.x: the object, its groups, and the result of LOO.

Arrays only, so that this file works without torch.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 speaks of 1.0 on import
    import arviz as az

__all__ = ["container", "elpd_data", "has_group", "relative_ess"]

OLD = az.__version__.startswith("0.")


def container(groups: Mapping[str, xr.Dataset]) -> Any:
    """Return an ArviZ object of these groups: `InferenceData` in 0.2x, `DataTree` in 1.x."""
    if OLD:
        return az.InferenceData(**groups)
    return xr.DataTree.from_dict(dict(groups))


def has_group(data: Any, name: str) -> bool:
    """Whether an ArviZ object has a group; ``data[name]`` returns it in both versions."""
    groups = data.groups() if callable(data.groups) else data.groups
    return name in {group.strip("/") for group in groups}


def relative_ess(data: Any) -> float:
    """Return the effective sample size of a posterior's chains, divided by their draws.

    That of the mean, averaged over all variables, as ArviZ's own LOO has it; 1 for a single chain.
    """
    posterior = data["posterior"]
    chains, draws = posterior.sizes["chain"], posterior.sizes["draw"]
    if chains == 1:
        return 1.0
    found = az.ess(xr.Dataset(posterior.data_vars), method="mean")
    values = np.hstack([np.ravel(found[name].values) for name in found.data_vars])
    return float(values.mean() / (chains * draws))


def elpd_data(
    elpd_i: xr.DataArray,
    pareto_k: xr.DataArray,
    p_loo: float,
    samples: int,
    threshold: float,
    *,
    corrected: bool = False,
) -> Any:
    """Return the result of LOO as this version of ArviZ has it, pointwise, for ``az.compare``.

    :param elpd_i: expected log pointwise predictive density of each datum, in nats
    :param p_loo: the effective number of parameters
    :param samples: the number of draws
    :param threshold: the largest k-hat to be trusted
    :param corrected: whether the draws were those of an approximate posterior, and weighted
    """
    count = elpd_i.size
    variance = float(elpd_i.values.var(ddof=0 if OLD else min(1, count - 1)))
    values = {
        "elpd": float(elpd_i.sum()),
        "se": math.sqrt(count * variance),
        "p": p_loo,
        "n_samples": samples,
        "n_data_points": count,
        "warning": bool((pareto_k > threshold).any()),
        "elpd_i": elpd_i,
        "pareto_k": pareto_k,
        "scale": "log",
        "good_k": threshold,
        "approx_posterior": corrected,
    }
    empty = _result_of_arviz()
    if not OLD:
        known = {field.name for field in dataclasses.fields(empty)}
        return dataclasses.replace(empty, **{k: v for k, v in values.items() if k in known})
    renamed = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
    found = {renamed.get(name, name): value for name, value in values.items()}
    return type(empty)(data=[found[name] for name in empty.index], index=list(empty.index))


@functools.cache
def _result_of_arviz() -> Any:
    """Return a result of ArviZ's own LOO, for its type."""
    noise = np.random.default_rng(0).normal(size=(1, 100, 2))
    draws = {"x": xr.DataArray(noise, dims=("chain", "draw", "place"))}
    groups = {"posterior": xr.Dataset(draws), "log_likelihood": xr.Dataset(draws)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return az.loo(container(groups), pointwise=True)
