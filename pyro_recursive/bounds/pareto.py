"""Pareto-smoothed importance weights, and the shape k-hat of their tail; pure torch.

`Pareto Smoothed Importance Sampling` (Vehtari et al., arXiv 1507.02646), with the estimator of `A
New and Efficient Estimation Method for the Generalized Pareto Distribution` (Zhang & Stephens,
Technometrics 2009).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# A fit needs more than this many weights in the tail, so more than 20 samples in all.
SMALLEST_TAIL = 4
# Largest weights that differ by less than this, in nats, have no tail: the rest may be rounding.
NO_TAIL = 1e-4
PRIOR_SCALE, PRIOR_DRAWS = 3, 10  # of the estimator's prior; k-hat is drawn to 1/2 by 10 draws
HEAVY = 0.5  # k-hats from here on are compared with those of the upper parts of the tail
SMALLEST_PART = 10  # of these
COLUMNS = 256  # that are fitted at once


class PSIS(NamedTuple):
    """Smoothed weights and their diagnostic, both float64.

    ``log_weights``, ``[S, *batch]`` in nats, are normalised: their logsumexp over S is 0,
    unless all weights are 0.
    ``pareto_k``, ``[*batch]``, is k-hat, reliable below `pareto_k_threshold`.
    """

    log_weights: Tensor
    pareto_k: Tensor


def psis(log_weights: Tensor, *, relative_ess: float = 1.0) -> PSIS:
    """Smooth the largest of S importance weights, and estimate the shape k of their tail.

    The min(S / 5, 3 sqrt(S / relative_ess)) largest weights are replaced by quantiles of a
    generalised Pareto distribution fitted to them. k-hat is 0 if the tail's weights agree within
    0.01 %. It is infinite, and nothing is smoothed, if S is 20 or less, if no more than 4 weights
    are above the tail's smallest, or if the fit fails. Where k-hat falls by three standard errors
    from one half of the tail to the next, the tail is the upper one: weights of guides that are
    nearly exact pile up at local maxima of the density ratio, which are no Pareto distribution.

    Args:
        log_weights: unnormalised, ``[S, *batch]`` in nats; -inf for a weight of 0. nan and +inf
            raise ValueError.
        relative_ess: effective sample size of the draws before weighting over S.

    Reference: `Pareto Smoothed Importance Sampling` (Vehtari et al., arXiv 1507.02646).

    >>> z = torch.randn(4000, 2, dtype=torch.float64)
    >>> light, heavy = 0.1 * z[:, 0], 2.0 * z[:, 1] ** 2  # the second has no mean: k = 4
    >>> (psis(torch.stack([light, heavy], -1)).pareto_k < pareto_k_threshold(4000)).tolist()
    [True, False]
    """
    raw = centred(log_weights)
    columns = raw.reshape(len(raw), -1)
    smoothed, k = columns.clone(), torch.full_like(columns[0], math.inf)
    size = math.ceil(min(len(raw) / 5, 3 * (len(raw) / relative_ess) ** 0.5))
    if size > SMALLEST_TAIL:
        tail, where = columns.topk(size + 1, dim=0)
        cutoff = tail[-1].clamp_min(math.log(torch.finfo(raw.dtype).tiny))
        flat = (tail[0] - cutoff < NO_TAIL) & (tail[0] > -math.inf)
        count = (tail > cutoff).sum(0).masked_fill(flat, 0)
        for length in count[count > SMALLEST_TAIL].unique().tolist():
            for own in (count == length).nonzero().squeeze(-1).split(COLUMNS):
                found, k[own] = _without_pile(tail[:length, own], cutoff[own])
                smoothed[where[:length, own], own] = found
        k = torch.where(k.isfinite(), k, math.inf).masked_fill(flat, 0.0)
    normalized = smoothed - smoothed.logsumexp(0).nan_to_num(neginf=0.0)
    return PSIS(normalized.reshape(raw.shape), k.reshape(raw.shape[1:]))


def _without_pile(tail: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_smoothed` does, for the part of the tail above weights that have piled up."""
    smoothed, k = _smoothed(tail, cutoff)
    size, columns = len(tail), (k >= HEAVY).nonzero().squeeze(-1)
    highest, size_of_highest = k[columns], torch.full_like(k[columns], size)
    while len(columns) and size >= 2 * SMALLEST_PART:
        size //= 2
        upper, k_upper = _smoothed(tail[:size, columns], tail[size, columns])
        error = (1 + highest) * (1 / size - 1 / size_of_highest).sqrt()  # of the difference
        is_pile = highest - k_upper > 3 * error
        own, is_higher = columns[is_pile], k_upper > highest
        smoothed[:size, own], smoothed[size:, own] = upper[:, is_pile], tail[size:, own]
        k[own] = k_upper[is_pile]
        highest = torch.where(is_higher, k_upper, highest)[~is_pile]
        size_of_highest = size_of_highest.masked_fill(is_higher, size)[~is_pile]
        columns = columns[~is_pile]
    return smoothed, k


def _smoothed(tail: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-weights in a tail, ``[n, C]`` in falling order, smoothed, and k-hat, ``[C]``."""
    k, sigma = _fit(tail.exp() - cutoff.exp())
    places = torch.arange(len(tail), 0, -1).to(tail) - 0.5
    log_above = torch.log1p(-places / len(tail))[:, None]
    quantiles = torch.where(k.abs() < torch.finfo(k.dtype).eps, -log_above, _expm1(k, log_above))
    found = (quantiles * sigma + cutoff.exp()).log().clamp_max(0.0)
    return torch.where(k.isfinite(), found, tail), k


def _expm1(k: Tensor, log_above: Tensor) -> Tensor:
    return torch.expm1(-k * log_above) / k


def _fit(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Return shape and scale of the generalised Pareto distribution of a tail, ``[C]`` both."""
    count = len(excess)
    grid = 30 + int(count**0.5)
    numbers = torch.arange(1, grid + 1).to(excess) - 0.5
    quartile = excess[count - int(count / 4 + 0.5)]
    b = (1 - (grid / numbers).sqrt())[:, None] / (PRIOR_SCALE * quartile) + 1 / excess[0]
    k = torch.log1p(-b[:, None] * excess).mean(1)
    log_likelihood = count * ((-b / k).log() - k - 1)
    weights = log_likelihood.softmax(0)
    weights = torch.where(weights < 10 * torch.finfo(weights.dtype).eps, 0.0, weights)
    b = (torch.where(weights > 0, b, 0.0) * weights).sum(0) / weights.sum(0)
    k = torch.log1p(-b * excess).mean(0)
    return (count * k + PRIOR_DRAWS / 2) / (count + PRIOR_DRAWS), -k / b


def centred(log_weights: Tensor) -> Tensor:
    """Return the weights in float64 with a maximum of 0, checked."""
    raw = log_weights.detach().double()
    wrong = (raw.isnan() | (raw == math.inf)).nonzero()
    if len(wrong):
        raise ValueError(
            f"log_weights has {len(wrong)} entries that are nan or +inf, the first at "
            f"{tuple(wrong[0].tolist())}. Use -inf for a weight of 0."
        )
    return raw - raw.amax(0).nan_to_num(neginf=0.0)


def pareto_k_threshold(num_samples: int) -> float:
    """Return the largest reliable k-hat for S samples, ``min(1 - 1 / log10(S), 0.7)``.

    >>> pareto_k_threshold(100)
    0.5
    """
    return 0.0 if num_samples <= 10 else min(1 - 1 / math.log10(num_samples), 0.7)
