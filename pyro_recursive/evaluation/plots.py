"""Pictures of diagnostics, on matplotlib (extra ``plots``).

Each draws on the axes it is given, or on those of a new figure, and returns the axes. Nothing is
shown or saved, and no setting of matplotlib is changed.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pyro_recursive.evaluation.calibration import Calibration
from pyro_recursive.evaluation.calibration.ranks import (
    binomial_interval,
    ecdf_band,
    ecdf_difference,
    rank_histogram,
)
from pyro_recursive.evaluation.gaps import Gaps
from pyro_recursive.evaluation.gradients import SNRSweep
from pyro_recursive.evaluation.importance import ImportanceWeights
from pyro_recursive.evaluation.psis import pareto_k_threshold

__all__ = [
    "plot_ecdf_difference",
    "plot_gaps",
    "plot_gradient_snr",
    "plot_history",
    "plot_pareto_k",
    "plot_ranks",
]

LARGEST_K = 0.7  # to be trusted, however many samples there are


def plot_pareto_k(
    pareto_k: Tensor | ImportanceWeights, num_samples: int | None = None, ax: Any = None
) -> Any:
    """Draw the Pareto k-hat of each datum, with the limits above which it cannot be trusted.

    The limit is ``min(1 - 1 / log10(S), 0.7)`` for S samples; above 1 the weights have no mean.
    Data without a number (nan) are left out, infinite ones drawn at the top.

    :param pareto_k: any shape, in the order of its entries; or importance weights, which know S
    :param num_samples: S, the samples behind each; None takes 0.7
    :param ax: matplotlib axes; None makes a figure
    :raises ImportError: matplotlib is not installed
    :raises ValueError: ``num_samples`` is below 1

    Source: 'Pareto Smoothed Importance Sampling' (Vehtari et al., arXiv 1507.02646).

    >>> import torch
    >>> plot_pareto_k(torch.tensor([0.1, 0.9]), num_samples=1000).get_ylabel()
    'Pareto k-hat'
    """
    if isinstance(pareto_k, ImportanceWeights):
        num_samples, pareto_k = len(pareto_k.log_weights), pareto_k.pareto_k
    limit = LARGEST_K if num_samples is None else pareto_k_threshold(num_samples)
    ax, k = _axes(ax), _array(pareto_k.flatten())
    top = 1.1 * max([1.05, *k[np.isfinite(k)]])
    ax.plot(range(len(k)), k.clip(max=top), "+", color="C0")
    label = f"{limit:.2f}: {(k > limit).sum()} of {(~np.isnan(k)).sum()} above"
    ax.axhline(limit, color="C1", linestyle="--", label=label)
    ax.axhline(1.0, color="C3", linestyle=":", label=f"1: {(k > 1).sum()} above")
    ax.set(xlabel="datum", ylabel="Pareto k-hat")
    ax.legend(fontsize="small")
    return ax


def plot_gradient_snr(sweep: SNRSweep, over: str = "K", at: int = 0, ax: Any = None) -> Any:
    """Draw the signal-to-noise ratios of a sweep in log-log coordinates, one line a group.

    Ratios that cannot be told from 0 are left out. The slopes are in the legend.

    :param sweep: of `gradient_snr_sweep`
    :param over: ``"K"``, or ``"M"``
    :param at: which of the Ms (of the Ks) is held
    :param ax: as in `plot_pareto_k`, as are errors
    """
    ax = _axes(ax)
    for place, group in enumerate(sorted(sweep.ratio)):
        sizes, ratio, error = (_array(part) for part in sweep.line(group, over, at))
        slope, uncertainty = sweep.slope(group, over, at)
        label = group if math.isnan(slope) else f"{group}: slope {slope:+.2f} ± {uncertainty:.2f}"
        ax.errorbar(sizes, ratio, error, marker="o", capsize=2, color=f"C{place % 10}", label=label)
    held = f"M = {sweep.num_estimates[at]}" if over == "K" else f"K = {sweep.num_particles[at]}"
    ax.set(xscale="log", yscale="log", xlabel=f"{over} ({held})", ylabel="signal-to-noise ratio")
    ax.legend(fontsize="small")
    return ax


def plot_ranks(
    ranks: Tensor | Calibration,
    num_draws: int | None = None,
    bins: int | None = None,
    level: float = 0.95,
    site: str | None = None,
    dim: int = 0,
    ax: Any = None,
) -> Any:
    """Draw the histogram of one number's ranks, with the interval that holds each uniform bin.

    :param ranks: the result of `calibration`; or ranks ``[N]``, 0 to L
    :param num_draws: L, which the result of `calibration` knows
    :param bins: as in `rank_histogram`
    :param level: of the interval, for all bins together (Bonferroni)
    :param site: which latent of the result, where there are several
    :param dim: which of the site's numbers
    :param ax: as in `plot_pareto_k`
    :raises ValueError: ranks that are no integers ``[N]``, or out of their range; no ``num_draws``;
        the site is not clear

    Source: 'Validating Bayesian Inference Algorithms with Simulation-Based Calibration' (Talts et
    al., arXiv 1804.06788).

    >>> import torch
    >>> len(plot_ranks(torch.arange(100), num_draws=99, bins=10).patches)
    10
    """
    own, num_draws = _ranks_of(ranks, num_draws, site)
    own = own[:, dim].unsqueeze(1) if isinstance(ranks, Calibration) else _one(own)
    ax = _axes(ax)
    counts, shares = rank_histogram(own, num_draws, bins)
    interval = binomial_interval(len(own), shares.cpu(), 1 - (1 - level) / len(shares))
    low, high = (_steps(_array(limit)) for limit in interval)
    edges = np.append(0.0, _array(shares.cumsum(0))) * (num_draws + 1)
    ax.bar(edges[:-1], _array(counts[:, 0]), np.diff(edges), align="edge", edgecolor="white")
    ax.fill_between(edges, low, high, step="post", color="0.6", alpha=0.5, label=f"{level:.0%}")
    ax.set(xlabel=f"rank among {num_draws} draws", ylabel="data sets", xlim=(0, num_draws + 1))
    ax.legend(fontsize="small")
    return ax


def plot_ecdf_difference(
    ranks: Tensor | Calibration,
    num_draws: int | None = None,
    level: float = 0.95,
    labels: Any = None,
    site: str | None = None,
    ax: Any = None,
) -> Any:
    """Draw the distribution functions of ranks minus the uniform one, with a simultaneous band.

    Draws that are too narrow give a curve that is first above and then below 0, draws that are too
    wide the reverse; draws too high a curve above 0, too low one below.

    :param ranks: the result of `calibration`; or ranks, ``[N]`` or ``[N, dims]``, 0 to L
    :param num_draws: L, which the result of `calibration` knows
    :param level: with which the band holds one whole curve, if ranks are uniform
    :param labels: a name for each of the dims
    :param site: which latent of the result, where there are several
    :param ax: as in `plot_pareto_k`
    :raises ValueError: as `plot_ranks`

    Source: 'Graphical Test for Discrete Uniformity and its Applications in Goodness of Fit
    Evaluation and Multiple Sample Comparison' (Säilynoja et al., arXiv 2103.10522).

    >>> import torch
    >>> len(plot_ecdf_difference(torch.randint(10, (50, 3)), num_draws=9).lines)
    3
    """
    own, num_draws = _ranks_of(ranks, num_draws, site)
    ax, own = _axes(ax), own.unsqueeze(1) if own.dim() == 1 else own
    at, difference = (_array(part) for part in ecdf_difference(own, num_draws))
    lower, upper = (_array(limit) for limit in ecdf_band(len(own), num_draws, level))
    band = {"step": "post", "color": "0.85", "zorder": 0}
    ax.fill_between(at, lower, upper, label=f"{level:.0%} band", **band)
    names = labels if labels is not None else [None] * difference.shape[1]
    for name, curve in zip(names, difference.T, strict=True):
        ax.plot(at, curve, drawstyle="steps-post", label=name)
    ax.set(xlabel="rank / draws", ylabel="ECDF - uniform", xlim=(0, 1))
    ax.legend(fontsize="small")
    return ax


def plot_gaps(gaps: Gaps | Mapping[str, Gaps], ax: Any = None) -> Any:
    """Draw mean approximation and amortisation gaps as stacked bars, one for each guide, in nats.

    With the standard error of the mean of their sum, the inference gap, over the rows. An
    amortisation gap below 0 (by chance) goes below the axis.

    :param gaps: what `pyro_recursive.evaluation.gaps.gaps` returns, or several by name
    :param ax: as in `plot_pareto_k`, as are errors
    """
    found = gaps if isinstance(gaps, Mapping) else {"": gaps}
    for each in found.values():
        if not isinstance(each, Gaps):
            raise TypeError(f"plot_gaps draws what gaps returns, got {type(each).__name__}")
    ax = _axes(ax)
    tables = [each.summary() for each in found.values()]
    family, encoder, whole = (
        np.array([table[part]["mean"] for table in tables])
        for part in ("approximation", "amortization", "inference")
    )
    error = np.nan_to_num([table["inference"]["standard error"] for table in tables])
    place = range(len(tables))
    ax.bar(place, family, label="approximation: the family")
    # On top of the other where both are above 0.
    bottom = np.where(encoder > 0, family.clip(min=0), 0.0)
    ax.bar(place, encoder, bottom=bottom, label="amortisation: the encoder")
    ax.errorbar(place, whole, error, fmt="none", color="0.2", capsize=4)
    ax.axhline(0, color="0.2", linewidth=0.8)
    ax.set_xticks(place, list(found))
    ax.set_ylabel("log p(x) - ELBO, nats per datum")
    ax.legend(fontsize="small")
    return ax


def plot_history(history: Any, per_row: bool = False, ax: Any = None) -> Any:
    """Draw the losses of `pyro_recursive.fit` by epoch, training and validation, in nats.

    Epochs without validation, and losses that are not finite, are left out; a circle is around the
    best epoch.

    :param history: a `pyro_recursive.training.history.History`, or several by name
    :param per_row: divide by the rows of a batch, for losses of the batch: nats per datum
    :param ax: as in `plot_pareto_k`, as are errors

    >>> from pyro_recursive.training.history import History
    >>> history = History(epoch=[1, 2], loss=[3.0, 2.0], validation=[None, 4.0])
    >>> plot_history(history).get_ylabel()
    'loss, nats'
    """
    ax = _axes(ax)
    found = history if isinstance(history, Mapping) else {"": history}
    for place, (name, each) in enumerate(found.items()):
        color, prefix = f"C{place % 10}", f"{name}: " if name else ""
        rows, held = each.rows if per_row else 1.0, each.validation_rows if per_row else 1.0
        ax.plot(each.epoch, _losses(each.loss, rows), ".-", color=color, label=f"{prefix}training")
        validation = _losses(each.validation, held)
        known = np.isfinite(validation)
        if known.any():
            epochs = np.array(each.epoch)[known]
            ax.plot(epochs, validation[known], ".--", color=color, label=f"{prefix}validation")
        if each.best_epoch is not None:
            best = each.epoch.index(each.best_epoch)
            ax.plot(each.best_epoch, validation[best], "o", color=color, fillstyle="none")
    ax.set(xlabel="epoch", ylabel="loss, nats per datum" if per_row else "loss, nats")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize="small")
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'pyro_recursive[plots]'.") from error
    return plt.subplots(layout="constrained")[1]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _ranks_of(
    ranks: Tensor | Calibration, num_draws: int | None, site: str | None
) -> tuple[Tensor, int]:
    """Return the ranks of one site, and among how many draws."""
    if isinstance(ranks, Calibration):
        if site is None and len(ranks.ranks) > 1:
            raise ValueError(f"Choose one of {sorted(ranks.ranks)} with site=.")
        if site is not None and site not in ranks.ranks:
            raise ValueError(f"There are no ranks of '{site}', but of {sorted(ranks.ranks)}.")
        return ranks.ranks[site or next(iter(ranks.ranks))], ranks.num_draws
    if num_draws is None:
        raise ValueError("Ranks need num_draws=, the number of draws that each is among.")
    return ranks, num_draws


def _one(ranks: Tensor) -> Tensor:
    if ranks.dim() != 1:
        raise ValueError(
            f"plot_ranks draws one number's ranks, [N], got {tuple(ranks.shape)}: choose a column."
        )
    return ranks.unsqueeze(1)


def _steps(values: np.ndarray) -> np.ndarray:
    """Repeat the last value, for the right edge of the last bin."""
    return np.append(values, values[-1:])


def _losses(values: list[Any], rows: Any) -> np.ndarray:
    """Return losses, nan where there is none or none that is finite."""
    found = np.array([math.nan if value is None else value for value in values])
    return np.where(np.isfinite(found), found, math.nan) / np.array(rows or math.nan)
