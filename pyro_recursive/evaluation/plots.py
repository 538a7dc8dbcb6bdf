"""Plots of diagnostics, on matplotlib (extra ``plots``).

Each function draws on the axes ``ax``, or on those of a new figure where it is None, and returns
them. Nothing is shown or saved, and no setting of matplotlib is changed. All raise ImportError
where matplotlib is not installed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from pyro_recursive.evaluation.calls import checked
from pyro_recursive.evaluation.gaps import Gaps
from pyro_recursive.evaluation.importance import ImportanceWeights, pareto_k_threshold
from pyro_recursive.evaluation.ranks import binomial_interval, ecdf_band, ecdf_difference
from pyro_recursive.evaluation.snr import SNRSweep

LARGEST_K = 0.7  # to be trusted, however many samples there are
MOST_BINS, PER_BIN = 20, 10  # of ranks, and the ranks expected in each


@checked
def plot_pareto_k(
    pareto_k: Tensor | ImportanceWeights, num_samples: int | None = None, ax: Any = None
) -> Any:
    """Plot the Pareto k-hat of each datum, with the limits above which it cannot be trusted.

    The limit is ``min(1 - 1 / log10(S), 0.7)`` for S samples (``num_samples``, which importance
    weights have; None takes 0.7); above 1 the weights have no mean. Values of nan are left out,
    infinite ones drawn at the top. A joint weight of all data is one point, on a labelled axis.

    >>> import torch
    >>> plot_pareto_k(torch.tensor([0.1, 0.9]), num_samples=1000).get_ylabel()
    'Pareto k-hat'
    """
    if isinstance(pareto_k, ImportanceWeights):
        num_samples, pareto_k = len(pareto_k.log_weights), pareto_k.pareto_k
    is_joint = pareto_k.dim() == 0
    limit = LARGEST_K if num_samples is None else pareto_k_threshold(num_samples)
    ax, k = _axes(ax), _array(pareto_k.flatten())
    top = 1.1 * max([1.05, *k[np.isfinite(k)]])
    ax.plot(range(len(k)), k.clip(max=top), "+" if len(k) > 1 else "o", color="C0")
    label = f"{limit:.2f}: {(k > limit).sum()} of {(~np.isnan(k)).sum()} above"
    ax.axhline(limit, color="C1", linestyle="--", label=label)
    ax.axhline(1.0, color="C3", linestyle=":", label=f"1: {(k > 1).sum()} above")
    ax.set(xlabel="datum", ylabel="Pareto k-hat")
    if is_joint:
        ax.set(xlabel="", xlim=(-1, 1))
        ax.set_xticks([0], ["joint weight"])
    return _with_legend(ax)


@checked
def plot_gradient_snr(sweep: SNRSweep, over: str = "K", at: int = 0, ax: Any = None) -> Any:
    """Plot the signal-to-noise ratios of a sweep in log-log coordinates, one line a group.

    Ratios that are not detected are left out. The slopes are in the legend. ``over`` is ``"K"`` or
    ``"M"``, ``at`` which of the Ms (of the Ks) is held.
    """
    ax = _axes(ax)
    for index, group in enumerate(sorted(sweep.ratio)):
        sizes, ratio, error = (_array(part) for part in sweep.line(group, over, at))
        slope, uncertainty = sweep.slope(group, over, at)
        label = group if math.isnan(slope) else f"{group}: slope {slope:+.2f} ± {uncertainty:.2f}"
        ax.errorbar(sizes, ratio, error, marker="o", capsize=2, color=f"C{index % 10}", label=label)
    held = f"M = {sweep.num_estimates[at]}" if over == "K" else f"K = {sweep.num_particles[at]}"
    ax.set(xscale="log", yscale="log", xlabel=f"{over} ({held})", ylabel="signal-to-noise ratio")
    return _with_legend(ax)


@checked
def plot_ranks(
    ranks: Tensor, num_draws: int, bins: int | None = None, level: float = 0.95, ax: Any = None
) -> Any:
    """Plot the histogram of one number's ranks, with the interval of uniform ranks in each bin.

    ``ranks`` ``[N]``, 0 to L = ``num_draws``, are a column of `Calibration.ranks`. ``bins`` is by
    default at most 20, with about 10 ranks or more in each; ``level`` is that of all bins together
    (Bonferroni).

    >>> import torch
    >>> len(plot_ranks(torch.arange(100), num_draws=99, bins=10).patches)
    10
    """
    ax, own, size = _axes(ax), ranks.cpu().numpy(), num_draws + 1
    bins = min(bins or max(2, min(MOST_BINS, len(own) // PER_BIN)), size)
    counts = np.bincount(own * bins // size, minlength=bins)
    shares = np.bincount(np.arange(size) * bins // size, minlength=bins) / size
    limits = binomial_interval(len(own), shares, (1 - level) / 2 / bins)
    low, high = (np.append(limit, limit[-1:]) for limit in limits)  # the right edge
    edges = np.append(0.0, shares.cumsum()) * size
    band = {"step": "post", "color": "0.85", "zorder": 0}
    ax.fill_between(edges, low, high, label=f"{level:.0%}", **band)
    outline = {"fill": False, "edgecolor": "C0", "linewidth": 1.5}  # the band is seen through it
    ax.bar(edges[:-1], counts, np.diff(edges), align="edge", **outline)
    ax.set(xlabel=f"rank among {num_draws} draws", ylabel="data sets", xlim=(0, size))
    return _with_legend(ax)


@checked
def plot_ecdf_difference(
    ranks: Tensor,
    num_draws: int,
    level: float = 0.95,
    labels: Sequence[str | None] | None = None,
    ax: Any = None,
) -> Any:
    """Plot the distribution functions of ranks minus the uniform one, with a simultaneous band.

    Draws that are too narrow give a curve that is first above and then below 0, draws that are too
    wide the reverse; draws too high a curve above 0, too low one below. ``ranks`` ``[N, dims]``, 0
    to L = ``num_draws``, are those of a site in `Calibration.ranks`, ``labels`` names of the dims;
    ``level`` is the probability that the band contains one whole curve of uniform ranks.

    >>> import torch
    >>> len(plot_ecdf_difference(torch.randint(10, (50, 3)), num_draws=9).lines)
    3
    """
    ax = _axes(ax)
    at, difference = (_array(part) for part in ecdf_difference(ranks, num_draws))
    lower, upper = (_array(limit) for limit in ecdf_band(len(ranks), num_draws, level))
    band = {"step": "post", "color": "0.85", "zorder": 0}
    ax.fill_between(at, lower, upper, label=f"{level:.0%} band", **band)
    for name, curve in zip(labels or [None] * len(difference.T), difference.T, strict=True):
        ax.plot(at, curve, drawstyle="steps-post", label=name)
    ax.set(xlabel="rank / draws", ylabel="ECDF - uniform", xlim=(0, 1))
    return _with_legend(ax)


@checked
def plot_gaps(gaps: Gaps | Mapping[str, Gaps], ax: Any = None) -> Any:
    """Plot mean approximation and amortisation gaps as stacked bars, one for each guide, in nats.

    Error bars are the standard errors of the mean inference gap over the rows. A negative gap (by
    chance) is below the axis. ``gaps`` is the result of `pyro_recursive.gaps`, or several by name.
    """
    found = gaps if isinstance(gaps, Mapping) else {"": gaps}
    ax = _axes(ax)
    tables = [each.summary() for each in found.values()]
    family, encoder, whole = (
        np.array([table[part]["mean"] for table in tables])
        for part in ("approximation", "amortization", "inference")
    )
    error = np.nan_to_num([table["inference"]["standard error"] for table in tables])
    position = range(len(tables))
    ax.bar(position, family, label="approximation: the family")
    bottom = np.where(encoder > 0, family.clip(min=0), 0.0)  # on top where both are above 0
    ax.bar(position, encoder, bottom=bottom, label="amortisation: the encoder")
    ax.errorbar(position, whole, error, fmt="none", color="0.2", capsize=4)
    ax.axhline(0, color="0.2", linewidth=0.8)
    ax.set_xticks(position, list(found))
    ax.set_ylabel("log p(x) - ELBO, nats per datum")
    return _with_legend(ax)


@runtime_checkable
class Losses(Protocol):
    """The losses of a training run by epoch, as in `pyro_recursive.training.history.History`."""

    epoch: Any
    loss: Any
    validation: Any
    best_epoch: Any


@checked
def plot_history(history: Losses, ax: Any = None) -> Any:
    """Plot the losses of `pyro_recursive.fit` by epoch, training and validation, in nats.

    Losses that are not there or not finite are left out; a circle is around the best epoch.
    ``history`` is a `pyro_recursive.training.history.History`.

    >>> from pyro_recursive.training.history import History
    >>> history = History(epoch=[1, 2], loss=[3.0, 2.0], validation=[None, 4.0])
    >>> plot_history(history).get_ylabel()
    'loss, nats'
    """
    ax, lines = _axes(ax), {"training": history.loss, "validation": history.validation}
    for label, values in lines.items():
        losses = np.array(values, dtype=float)
        known = np.isfinite(losses)
        if known.any():
            ax.plot(np.array(history.epoch)[known], losses[known], ".-", label=label)
    if history.best_epoch is not None:
        best = history.epoch.index(history.best_epoch)
        ax.plot(history.best_epoch, history.validation[best], "o", color="C1", fillstyle="none")
    ax.set(xlabel="epoch", ylabel="loss, nats")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return _with_legend(ax)


@checked
def plot_saliency(values: Tensor, ax: Any = None) -> Any:
    """Plot the saliency of sequences ``[rows, length]``: a line of an image for each row.

    >>> import torch
    >>> plot_saliency(torch.rand(3, 10)).get_xlabel()
    'symbol'
    """
    if values.dim() != 2:
        raise ValueError(f"values must be [rows, length], got {list(values.shape)}.")
    ax = _axes(ax)
    image = ax.imshow(_array(values), aspect="auto", cmap="viridis", vmin=0.0)
    label = "saliency, nats per unit of the latents"
    ax.figure.colorbar(image, ax=ax, label=label)
    ax.set(xlabel="symbol", ylabel="row")
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'pyro_recursive[plots]'.") from error
    return plt.subplots(layout="constrained")[1]


def _with_legend(ax: Any) -> Any:
    ax.legend(fontsize="small")
    return ax


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
