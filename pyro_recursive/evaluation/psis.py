"""Pareto-smoothed importance sampling: weights that can be trusted, and a number that says so.

A generalised Pareto distribution is fitted to the largest weights; its quantiles replace them, and
its shape k-hat tells how heavy their tail is. Pure functions of tensors, for any batch at once.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PSIS", "effective_sample_size", "pareto_k_threshold", "psis"]

# A fit needs more than this many weights in the tail, so more than 20 samples in all.
SMALLEST_TAIL = 4
# Weights that rise by less than this above the start of their tail have no tail, in nats: they are
# equal to 0.01 %, and what is left may be rounding.
NO_TAIL = 1e-4
# A weak prior of k-hat, worth ten observations of 0.5; and that of the fit's grid.
PRIOR_SIZE, PRIOR_K, PRIOR_GRID = 10, 0.5, 3


class PSIS(NamedTuple):
    """Smoothed weights and their diagnostic, both float64.

    ``log_weights``, ``[S, *batch]`` in nats, are normalised: their logsumexp over S is 0.
    ``pareto_k``, ``[*batch]``, is k-hat: to be trusted below `pareto_k_threshold`.
    """

    log_weights: Tensor
    pareto_k: Tensor


def psis(log_weights: Tensor, *, relative_ess: float = 1.0) -> PSIS:
    """Smooth the largest of S importance weights, and say how heavy their tail is.

    The M = min(S / 5, 3 sqrt(S / relative_ess)) largest weights are replaced by quantiles of a
    generalised Pareto distribution fitted to them (Zhang & Stephens 2009, with a weak prior), but
    for none above the largest weight. The numbers are those of ``psislw`` in ArviZ 0.2x (1.x rounds
    M down, not up), except:

    - weights that are equal to 0.01 % from the start of the tail up, those of an exact guide or of
      a discrete one, have no tail: k-hat is 0, where ArviZ has infinity;
    - where the fit fails, k-hat is infinite, and not nan.

    With 20 samples or fewer, no more than 4 different weights in the tail, or no weight at all,
    nothing can be said: k-hat is infinite, and the weights stay as they are.

    :param log_weights: unnormalised log-weights ``[S, *batch]`` in nats; -inf where there is none
    :param relative_ess: effective sample size of the draws before weighting, divided by S: 1 for
        independent draws, less for those of a Markov chain
    :raises ValueError: log_weights has nan or +inf, or no samples; relative_ess is not positive

    Cost: one partial sort and about 30 + sqrt(M) passes over the tails, in float64.

    Source: `Pareto Smoothed Importance Sampling` (Vehtari et al., arXiv 1507.02646), and for
    variational inference `Yes, but Did It Work?` (Yao et al., arXiv 1802.02538).

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> z = torch.randn(4000, 2, dtype=torch.float64)
    >>> wide, narrow = 0.1 * z[:, 0], 2.0 * z[:, 1] ** 2  # the second has no mean: k = 4
    >>> result = psis(torch.stack([wide, narrow], -1))
    >>> (result.pareto_k < pareto_k_threshold(4000)).tolist()
    [True, False]
    >>> bool(result.log_weights.logsumexp(0).abs().max() < 1e-12)
    True
    """
    if not 0 < relative_ess < math.inf:
        raise ValueError(f"relative_ess must be a positive number, got {relative_ess!r}")
    raw = _centred(log_weights)
    size = math.ceil(min(len(raw) / 5, 3 * (len(raw) / relative_ess) ** 0.5))
    if size <= SMALLEST_TAIL:
        return PSIS(_normalized(raw), torch.full_like(raw[0], math.inf))
    top, places = raw.topk(size + 1, dim=0)
    cutoff = top[-1].clamp_min(math.log(torch.finfo(raw.dtype).tiny))
    tail = top[:-1]
    inside = tail > cutoff
    count = inside.sum(0)
    k, sigma = _fit((tail.exp() - cutoff.exp()).clamp_min(0), count)
    flat = (tail[0] - cutoff < NO_TAIL) & (tail[0] > -math.inf)
    fitted = (count > SMALLEST_TAIL) & k.isfinite() & ~flat
    quantiles = _quantiles(k, sigma, count, size)
    smoothed = (quantiles + cutoff.exp()).log().clamp_max(0)  # at most the largest raw weight
    smoothed = torch.where(inside & fitted, smoothed, tail)
    k = torch.where(fitted, k, math.inf).masked_fill(flat, 0.0)
    return PSIS(_normalized(raw.scatter(0, places[:-1], smoothed)), k)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return how many equal weights these are worth, ``(sum w)^2 / sum w^2``, in samples.

    Kish's effective sample size, between 1 and S; 0 where no sample has any weight. It overlooks
    what no sample has found: see `psis` for that.

    :param log_weights: log-weights ``[S, *batch]`` in nats, normalised or not
    :return: ``[*batch]``, float64
    :raises ValueError: log_weights has nan or +inf, or no samples

    Source: `Pareto Smoothed Importance Sampling` (Vehtari et al., arXiv 1507.02646).

    >>> import torch
    >>> round(effective_sample_size(torch.tensor([0.0, 0.0, 0.0, -float("inf")])).item(), 3)
    3.0
    """
    raw = _centred(log_weights)
    return torch.exp(2 * raw.logsumexp(0) - (2 * raw).logsumexp(0)).nan_to_num(nan=0.0)


def pareto_k_threshold(num_samples: int) -> float:
    """Return the largest k-hat to be trusted with S samples, ``min(1 - 1 / log10(S), 0.7)``.

    :raises ValueError: num_samples < 1

    Source: `Pareto Smoothed Importance Sampling` (Vehtari et al., arXiv 1507.02646).

    >>> [round(pareto_k_threshold(S), 2) for S in (100, 1000, 5000)]
    [0.5, 0.67, 0.7]
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples!r}")
    return 0.0 if num_samples <= 10 else min(1 - 1 / math.log10(num_samples), 0.7)


def _centred(log_weights: Tensor) -> Tensor:
    """Return the weights in float64 with a maximum of 0, checked."""
    raw = log_weights.detach().double()
    if raw.dim() < 1 or len(raw) < 1:
        raise ValueError(f"log_weights must be [S, *batch] with S >= 1, got {tuple(raw.shape)}")
    wrong = raw.isnan() | (raw == math.inf)
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"log_weights has {int(wrong.sum())} entries that are nan or +inf, the first at "
            f"{place}: {raw[place].item()}. A sample without any weight has -inf."
        )
    highest = raw.amax(0)
    return raw - highest.masked_fill(highest == -math.inf, 0.0)


def _normalized(raw: Tensor) -> Tensor:
    total = raw.logsumexp(0)
    return raw - total.masked_fill(total == -math.inf, 0.0)


def _fit(excess: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a generalised Pareto distribution to each column; return k, with its prior, and sigma.

    :param excess: ``[M, *batch]``, descending, and 0 from place `count` on

    The posterior mean of b = k / sigma on a grid, then the k that is likeliest for it.
    """
    sizes = count.to(excess)
    points = 30 + sizes.sqrt().floor()
    quartile = ((sizes / 4 + 0.5).floor() - 1).long()  # from below
    places = (count - 1 - quartile).clamp(0, len(excess) - 1)
    quarter = excess.gather(0, places.unsqueeze(0))
    rows = torch.arange(1.0, 31.0 + math.isqrt(len(excess)), dtype=excess.dtype)
    row = rows.to(excess.device).reshape(-1, *[1] * count.dim())
    grid = (1 - (points / (row - 0.5)).sqrt()) / (PRIOR_GRID * quarter) + 1 / excess[:1]
    k = torch.stack([_mean_log(excess, b, sizes) for b in grid])
    profile = sizes * ((-grid / k).log() - k - 1)
    weights = profile.masked_fill(row > points, -math.inf).softmax(0)
    weights = weights.masked_fill(weights < 10 * torch.finfo(weights.dtype).eps, 0.0)
    b = (grid * weights).sum(0) / weights.sum(0)
    likeliest = _mean_log(excess, b, sizes)
    sigma = -likeliest / b
    return (sizes * likeliest + PRIOR_SIZE * PRIOR_K) / (sizes + PRIOR_SIZE), sigma


def _mean_log(excess: Tensor, b: Tensor, sizes: Tensor) -> Tensor:
    """Return the mean of log(1 - b x) over each column's tail; what is outside of it is 0."""
    return torch.log1p(-b * excess).sum(0) / sizes


def _quantiles(k: Tensor, sigma: Tensor, count: Tensor, size: int) -> Tensor:
    """Return the quantiles at (i + 1/2) / count of each column, descending, ``[M, *batch]``."""
    rows = torch.arange(0.5, size, dtype=k.dtype, device=k.device)
    above = rows.reshape(-1, *[1] * k.dim()) / count  # the probability of a larger value
    log_above = above.clamp_max(1).log()
    straight = k.abs() < torch.finfo(k.dtype).eps  # an exponential distribution
    curved = torch.expm1(-k * log_above) / k.masked_fill(straight, 1.0)
    return sigma * torch.where(straight, -log_above, curved)
