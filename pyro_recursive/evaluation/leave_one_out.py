"""Leave-one-out cross-validation of an ArviZ object, corrected for draws of a guide.

Importing this module imports ArviZ, which takes seconds.
"""

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_recursive.evaluation.calls import checked
from pyro_recursive.evaluation.importance import effective_sample_size, pareto_k_threshold, psis
from pyro_recursive.tracing.user_warnings import warn_user

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces 1.0 when imported
    import arviz as az

OLD = az.__version__.startswith("0.")

if TYPE_CHECKING:
    from arviz import ELPDData, InferenceData

    ArvizData: TypeAlias = InferenceData | xr.DataTree
else:
    ArvizData = az.InferenceData if OLD else xr.DataTree

# Attributes of the log-likelihoods: sites with a scale of the user's own; factors; of a site, its
# iteration of the loops around it. Of the statistics: why draws have no weights. Of a latent site:
# whether the posterior was sampled without it.
SCALED, FACTORS, CELL, UNWEIGHTED = "scaled_sites", "factors", "iteration", "unweighted"
SUMMED = "summed_out"
SAMPLE = ("chain", "draw")


@checked
def loo(data: ArvizData, var_name: str | None = None) -> "ELPDData":
    """Return PSIS-LOO of an ArviZ object, corrected for draws that are not from the posterior.

    The expected log pointwise predictive density, for each row i of the data in nats,

        elpd_i = log sum_s w_is p(x_i | z_s),   w_is ~ p(x, z_s) / (q(z_s) p(x_i | z_s)),

    with Pareto-smoothed, normalised weights. All sites of a row, factors too, make one x_i: a row
    is an entry of the plates that sites with a plate in common share, or an iteration of a loop.
    Sites that are summed together over enumerated latents (see `log_likelihoods`) are one row, too.
    Draws without ``sample_stats["log_weight"]``, of Markov chains or resampled, count as draws from
    the posterior, as in ``az.loo``. Point estimates of a guide are taken as given; masked data are
    left out. A k-hat above the threshold warns: that of the guide's weights where all rows share
    one, else those of the rows.

    Args:
        data: an object of `to_arviz` or `mcmc_to_arviz`, or another with ``log_likelihood``.
        var_name: an observed site, to score its entries alone.

    Returns:
        ArviZ's ``ELPDData`` with pointwise values, for ``az.compare({"a": loo(a), "b": loo(b)})``.

    Raises:
        ValueError: the log-likelihood is missing or not finite; the model has a `poutine.scale`; or
            draws of a guide have no weights.

    Reference: `Bayesian leave-one-out cross-validation for large data` (Magnusson et al.,
    1904.10679).

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro_recursive.evaluation.arviz import to_arviz
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)
    >>> def guide(x):  # the posterior's scale is 0.71
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.9))
    >>> found = loo(to_arviz(model, guide, torch.zeros(3), num_draws=4000))
    >>> round(found.iloc[0], 1)  # of the evidence: latents are local
    -3.8
    """
    rows = _rows(data, var_name)
    matrix = torch.cat([_matrix(row) for row in rows], 1)
    seen = _seen(matrix, ", ".join(str(row.name) for row in rows))
    weights = [_log_weights(data, row) for row in rows]
    corrected = [_matrix(weight) for weight in weights if weight is not None]
    correction = torch.cat(corrected, 1)[:, seen] if corrected else matrix.new_zeros(1, 1)
    is_shared = bool((correction == correction[:, :1]).all())
    reff = _relative_ess(data) if not corrected and has_group(data, "posterior") else 1.0
    matrix = matrix[:, seen]
    without = psis(correction - matrix, relative_ess=reff)
    elpd = (without.log_weights + matrix).logsumexp(0)
    column = correction[:, :1] if is_shared else correction
    everything = psis(column.expand(len(matrix), -1), relative_ess=reff)
    p_loo = (everything.log_weights + matrix).logsumexp(0) - elpd
    is_joint = bool(corrected) and len(elpd) > 1 and is_shared
    threshold = pareto_k_threshold(len(matrix))
    joint_k = float(everything.pareto_k[0]) if is_joint else -math.inf
    high = _warn(without.pareto_k, joint_k, threshold, corrected=bool(corrected))
    variance = elpd.var(correction=0 if OLD else min(1, len(elpd) - 1))
    pointwise = {
        "elpd_i": elpd,
        "pareto_k": without.pareto_k.clamp_min(joint_k),  # a row's weight has the joint one's tail
        "p_loo_i": p_loo,
        "n_eff_i": effective_sample_size(without.log_weights),
        "log_weights": without.log_weights,
    }
    values = {
        "elpd": float(elpd.sum()),
        "se": float((len(elpd) * variance).sqrt()),
        "p": float(p_loo.sum()),
        "n_samples": len(matrix),
        "n_data_points": len(elpd),
        "warning": high,
        **{name: _labelled(each, seen, rows) for name, each in pointwise.items()},
        "scale": "log",
        "good_k": threshold,
    }
    return _elpd_data(values, corrected=bool(corrected))


def _warn(pareto_k: Tensor, joint_k: float, threshold: float, *, corrected: bool) -> bool:
    """Warn of k-hats above the threshold, in one sentence; return whether there are any."""
    high = int((pareto_k > threshold).sum())
    if joint_k > threshold:
        warn_user(
            f"The guide's joint weight of all data has k-hat {joint_k:.2f}, above {threshold:.2f}: "
            "no elpd is reliable. Improve the guide, or predict new rows."
        )
    elif high:
        cause = "the guide is far from the posterior, or " if corrected else ""
        warn_user(
            f"k-hat is above {threshold:.2f} for {high} of {len(pareto_k)} data: {cause}the data "
            "are predicted poorly. Their elpd is not reliable."
        )
    return high > 0 or joint_k > threshold


def _rows(data: ArvizData, var_name: str | None) -> list[xr.DataArray]:
    """Return the log-likelihoods of rows, ``(chain, draw, *plates)`` for each kind of rows."""
    if not has_group(data, "log_likelihood"):
        raise ValueError("loo needs the group log_likelihood. Use log_likelihood=True.")
    group = data["log_likelihood"]
    if scaled := group.attrs.get(SCALED):
        raise ValueError(f"Leave-one-out needs a model without poutine.scale, at {scaled}.")
    names = map(str, group.data_vars)
    sites = {name: group[name].transpose(*SAMPLE, ...) for name in names}
    if var_name is not None:
        if var_name not in sites:
            raise ValueError(f"There is no log-likelihood of '{var_name}', only of {[*sites]}.")
        return [sites[var_name]]
    factors = np.atleast_1d(group.attrs.get(FACTORS, [])).tolist()
    rows = {n: s for n, s in sites.items() if n not in factors or _plates(s) or CELL in s.attrs}
    return [_summed(each) for each in _of_one_row(list((rows or sites).values()))]


def _plates(site: xr.DataArray) -> set[str]:
    return {str(dim) for dim in site.dims} - set(SAMPLE)


def _of_one_row(sites: list[xr.DataArray]) -> list[list[xr.DataArray]]:
    """Return the sites in groups: those with a plate or an iteration of a loop in common."""
    groups: list[list[xr.DataArray]] = []
    for site in sites:
        joined = [group for group in groups if any(_is_near(site, other) for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([*(other for group in joined for other in group), site])
    return groups


def _is_near(site: xr.DataArray, other: xr.DataArray) -> bool:
    cells = site.attrs.get(CELL), other.attrs.get(CELL)
    return cells[0] == cells[1] and (cells[0] is not None or bool(_plates(site) & _plates(other)))


def _summed(sites: list[xr.DataArray]) -> xr.DataArray:
    """Return the sum of the sites of a row over all but their common plates, nan where masked."""
    shared = set.intersection(*map(_plates, sites))
    names = [str(site.name) for site in sites]
    if not shared and any(map(_plates, sites)):
        raise ValueError(f"Sites {names} have no plate in common: choose one with var_name=.")
    if len(sites) == 1:
        return sites[0]
    parts = [site.sum(list(_plates(site) - shared), min_count=1) for site in sites]
    total = xr.concat(parts, "site", coords="minimal", compat="override").sum("site", min_count=1)
    return total.rename("+".join(names)).transpose(*SAMPLE, ...)


def _log_weights(data: ArvizData, log_lik: xr.DataArray) -> xr.DataArray | None:
    """Return the guide's log-weights for each datum; None for draws from the posterior.

    Those of plates that the datum is not in are summed: the weight is a product over their entries.
    """
    if not has_group(data, "sample_stats") or "log_weight" not in data["sample_stats"]:
        return None
    found = data["sample_stats"]["log_weight"]
    if bool(found.isnull().any()):
        reason = data["sample_stats"].attrs.get(UNWEIGHTED) or "Some of them are nan."
        raise ValueError(f"The draws have no weights. {reason}")
    found = found.sum([dim for dim in found.dims if dim not in log_lik.dims])
    return found.broadcast_like(log_lik).transpose(*log_lik.dims)


def _matrix(array: xr.DataArray) -> Tensor:
    """Return ``[S, data]``."""
    values = torch.from_numpy(np.ascontiguousarray(array.values, dtype=np.float64))
    return values.reshape(values.shape[0] * values.shape[1], -1)


def _seen(matrix: Tensor, name: str) -> Tensor:
    """Return which data are not masked; raise if their log-likelihoods are not finite."""
    seen = ~matrix.isnan().all(0)
    wrong = (seen & ~matrix.isfinite().all(0)).nonzero().flatten().tolist()
    if wrong or not bool(seen.any()):
        raise ValueError(f"The log-likelihood of '{name}' is not finite, at {wrong}.")
    return seen


def _labelled(values: Tensor, seen: Tensor, rows: list[xr.DataArray]) -> xr.DataArray:
    """Return values of the data, ``[data]`` or ``[S, data]``, with their labels.

    In one dim if rows are of several kinds, or some are masked.
    """
    like = rows[0] if values.dim() == 2 else rows[0].isel(chain=0, draw=0, drop=True)
    if len(rows) == 1 and bool(seen.all()):
        return like.copy(data=values.reshape(like.shape).numpy())
    sites = [str(row.name) for row in rows for _ in range(row[0, 0].size)]
    kept = [site for site, is_seen in zip(sites, seen.tolist(), strict=True) if is_seen]
    sample = SAMPLE if values.dim() == 2 else ()
    shape = (*(like.sizes[dim] for dim in sample), len(kept))
    labels = {"site": ("observed", kept)}
    return xr.DataArray(values.reshape(shape).numpy(), labels, (*sample, "observed"))


def _relative_ess(data: ArvizData) -> float:
    """Return the effective sample size of a posterior's mean over its draws, as ``az.loo`` does."""
    posterior = data["posterior"]
    chains, draws = posterior.sizes["chain"], posterior.sizes["draw"]
    if chains == 1:
        return 1.0
    sampled = {n: v for n, v in posterior.data_vars.items() if SUMMED not in v.attrs}
    found = az.ess(xr.Dataset(sampled), method="mean")
    values = np.hstack([np.ravel(found[name].values) for name in found.data_vars])
    return float(values.mean() / (chains * draws))


# --- ArviZ 0.2x and 1.x


def _elpd_data(values: dict[str, Any], *, corrected: bool) -> "ELPDData":
    """Return the result of LOO as ArviZ's own function returns it in this version."""
    if OLD:
        names = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
        new = {"p_loo_i", "n_eff_i", "log_weights"}  # since 1.0
        shown = {name: value for name, value in values.items() if name not in new}
        return az.ELPDData([*shown.values()], [names.get(name, name) for name in shown])
    noise = np.random.default_rng(0).normal(size=(1, 100, 2))
    draws = xr.Dataset({"x": (("chain", "draw", "x_dim"), noise)})
    data = xr.DataTree.from_dict({"posterior": draws, "log_likelihood": draws})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = az.loo(data, pointwise=True)  # its class and fields differ between releases
    fields = {field.name for field in dataclasses.fields(result)}
    own = {name for name in fields if isinstance(getattr(result, name), xr.DataArray | np.ndarray)}
    values = {**dict.fromkeys(own), **values, "approx_posterior": corrected}
    return dataclasses.replace(result, **{n: v for n, v in values.items() if n in fields})


def has_group(data: ArvizData, name: str) -> bool:
    """Whether an ArviZ object has a group; ``data[name]`` returns it in both versions."""
    groups = data.groups() if callable(data.groups) else data.groups
    return name in {group.strip("/") for group in groups}
