"""Leave-one-out cross-validation from draws of a guide, which is no posterior."""

import warnings
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_recursive.evaluation.arviz.versions import elpd_data, has_group, relative_ess
from pyro_recursive.evaluation.psis import pareto_k_threshold, psis

__all__ = ["SCALED", "UNWEIGHTED", "loo"]

# Attributes of the log-likelihoods and the statistics: sites with a scale of the user's own, and
# why draws have no weights.
SCALED, UNWEIGHTED = "scaled_sites", "unweighted"


def loo(data: Any, var_name: str | None = None) -> Any:
    """Return PSIS-LOO of an ArviZ object, corrected for draws that are not from the posterior.

    The expected log pointwise predictive density, for each datum i in nats,

        elpd_i = log sum_s w_is p(x_i | z_s),   w_is ~ p(x, z_s) / (q(z_s) p(x_i | z_s)),

    with Pareto-smoothed, normalised weights: the guide's q is corrected by importance weights, and
    the datum taken out. Where latents belong to one datum, that is an estimate of log p(x_i). Draws
    without ``sample_stats["log_weight"]``, of Markov chains or resampled ones, count as draws from
    the posterior, as in ArviZ's own ``loo``, which has no correction.

    Point estimates of a guide are taken as given, although they have seen the datum. Masked data
    are left out. Models with a scale of the user's own (a tempered likelihood) are refused: the
    data have no density then that could be left out. A k-hat above the threshold warns, as in
    ArviZ: the datum's elpd_i is not to be trusted then, because the guide is bad or the datum
    surprising.

    The result is ArviZ's ``ELPDData`` with pointwise values, for ``az.compare({"a": loo(a), "b":
    loo(b)})``: two guides, two models, a guide and NUTS (`mcmc_to_arviz`).

    :param data: the object of `to_arviz` or `mcmc_to_arviz`, or another one with the group
        ``log_likelihood``
    :param var_name: the observed site; needed where there are several
    :raises ValueError: the log-likelihood is missing, or that of several sites and none is named,
        or infinite, or nan for a part of the draws; the model has a scale of the user's own; the
        draws are from a guide and have no weights

    Source: `Bayesian leave-one-out cross-validation for large data` (Magnusson et al., arXiv
    1904.10679), `Pareto Smoothed Importance Sampling` (Vehtari et al., arXiv 1507.02646).

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pyro_recursive.evaluation.arviz import to_arviz
    >>> pyro.set_rng_seed(0)
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):  # the posterior's scale is 0.71
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.9))
    >>> x = torch.tensor([0.0, 1.0, 2.0])
    >>> found = loo(to_arviz(model, guide, x, num_draws=4000))
    >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum()
    >>> bool(abs(found.iloc[0] - exact) < 0.05)
    True
    """
    log_lik = _log_likelihood(data, var_name)
    matrix = _matrix(log_lik)
    seen = _seen(matrix, str(log_lik.name))
    weights = _log_weights(data, log_lik)
    correction = torch.zeros(()) if weights is None else _matrix(weights)[:, seen]
    reff = relative_ess(data) if weights is None and has_group(data, "posterior") else 1.0
    matrix = matrix[:, seen]
    without = psis(correction - matrix, relative_ess=reff)
    elpd = (without.log_weights + matrix).logsumexp(0)
    everything = psis(correction.expand_as(matrix), relative_ess=reff).log_weights
    p_loo = float(((everything + matrix).logsumexp(0) - elpd).sum())
    threshold = pareto_k_threshold(len(matrix))
    _warn(without.pareto_k, threshold, corrected=weights is not None)
    elpd_i, pareto_k = (_labelled(each, seen, log_lik) for each in (elpd, without.pareto_k))
    return elpd_data(elpd_i, pareto_k, p_loo, len(matrix), threshold, corrected=weights is not None)


def _log_likelihood(data: Any, var_name: str | None) -> xr.DataArray:
    if not has_group(data, "log_likelihood"):
        raise ValueError(
            "loo needs the group log_likelihood: to_arviz and mcmc_to_arviz make it, unless they "
            "are called with log_likelihood=False."
        )
    group = data["log_likelihood"]
    if scaled := group.attrs.get(SCALED):
        raise ValueError(
            f"The model has a scale of its own (poutine.scale) at {scaled}, and a tempered "
            "posterior has no leave-one-out. Call to_arviz or mcmc_to_arviz on a model without the "
            "scale, with a guide or a chain that was fitted without it."
        )
    names = [str(name) for name in group.data_vars]
    if var_name is None and len(names) > 1:
        raise ValueError(f"There are log-likelihoods of {names}: choose one with var_name=.")
    if var_name is not None and var_name not in names:
        raise ValueError(f"There is no log-likelihood of '{var_name}'; there is that of {names}.")
    found = group[names[0] if var_name is None else var_name]
    return found.transpose("chain", "draw", ...)


def _log_weights(data: Any, log_lik: xr.DataArray) -> xr.DataArray | None:
    """Return the guide's log-weights for each datum, None where there are none.

    Those of plates that the datum is not in are summed: the weights are products over their
    entries, and so are those of everything but the datum.
    """
    if not has_group(data, "sample_stats") or "log_weight" not in data["sample_stats"]:
        return None
    found = data["sample_stats"]["log_weight"]
    if bool(found.isnull().any()):
        reason = data["sample_stats"].attrs.get(UNWEIGHTED) or "Some of them are nan."
        raise ValueError(
            "The draws are from a guide, and have no weights to correct them: LOO is not defined. "
            f"{reason}"
        )
    found = found.sum([dim for dim in found.dims if dim not in log_lik.dims])
    return found.broadcast_like(log_lik).transpose(*log_lik.dims)


def _matrix(array: xr.DataArray) -> Tensor:
    """Return ``[S, data]``."""
    values = torch.from_numpy(np.ascontiguousarray(array.values, dtype=np.float64))
    return values.reshape(values.shape[0] * values.shape[1], -1)


def _seen(matrix: Tensor, name: str) -> Tensor:
    """Return which data are not masked, checked."""
    missing = matrix.isnan()
    partly = missing.any(0) & ~missing.all(0)
    infinite = matrix.isinf().any(0)
    for what, where in (("nan for a part of the draws", partly), ("infinite", infinite)):
        if bool(where.any()):
            raise ValueError(
                f"The log-likelihood of '{name}' is {what}, at {int(where.sum())} of {len(where)} "
                f"data, the first of them number {int(where.nonzero()[0])}: LOO is not defined."
            )
    if bool(missing.all()):
        raise ValueError(f"All data of '{name}' are masked: there is nothing to leave out.")
    return ~missing.any(0)


def _labelled(values: Tensor, seen: Tensor, log_lik: xr.DataArray) -> xr.DataArray:
    """Give the data their labels again; those that are left are in one dim, if any are masked."""
    first = log_lik.isel(chain=0, draw=0, drop=True)
    if bool(seen.all()):
        return first.copy(data=values.reshape(first.shape).numpy())
    return xr.DataArray(values.numpy(), dims=("observed",), name=first.name)


def _warn(pareto_k: Tensor, threshold: float, *, corrected: bool) -> None:
    high = int((pareto_k > threshold).sum())
    if high:
        cause = "the guide is far from the posterior, or " if corrected else ""
        warnings.warn(
            f"k-hat is above {threshold:.2f} for {high} of {len(pareto_k)} data, whose elpd is not "
            f"to be trusted: {cause}these data are surprising to the model. See pareto_k of the "
            "result, and importance_weights for the guide.",
            stacklevel=3,
        )
