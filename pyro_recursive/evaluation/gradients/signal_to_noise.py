"""How large a gradient is beside its own noise: pure torch, from independent draws of it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["GradientMoments", "SignalToNoise", "log_slope", "signal_to_noise"]

NUM_BLOCKS = 10  # of draws; the jackknife leaves out one after the other
CLEAR = 3  # standard errors that a ratio must have to be told from 0


class SignalToNoise(NamedTuple):
    """The signal-to-noise ratio of a gradient: a pure number, without a unit.

    ``ratio`` is the root mean square over the coordinates of ``|mean| / standard deviation``, a
    float64 scalar, ``error`` its standard error, and ``detected`` whether it can be told from 0
    (three standard errors): where it is False, the ratio is the noise of the measurement, and more
    draws are needed. ``by_coordinate``, ``[D]``, has the ratio of each.

    Coordinates without any noise are left out of ``ratio``: their own is infinite, or nan where
    the gradient is always 0. If there are no others, so is the ratio.
    """

    ratio: Tensor
    error: Tensor
    detected: Tensor
    by_coordinate: Tensor

    def __str__(self) -> str:
        """Return the ratio in words."""
        found = f"{self.ratio.item():.3g} ± {self.error.item():.2g}"
        doubt = "" if self.detected else ", which cannot be told from 0"
        return f"signal-to-noise {found} over {len(self.by_coordinate)} coordinates{doubt}"

    def __repr__(self) -> str:
        """Return the same: a dict of groups is readable then."""
        return str(self)


def signal_to_noise(gradients: Tensor) -> SignalToNoise:
    """Return the signal-to-noise ratio of a gradient from n independent draws, ``[n, *shape]``.

    The squared mean of n draws is too large by a variance over n, and the inverse of an estimated
    variance by (n - 1) / (n - 3); without these no ratio below ``1 / sqrt(n)`` could be seen. In
    each coordinate, with mean m and variance v of the draws, the estimate of the squared ratio is

        (n - 3) / (n - 1) * m ** 2 / v - 1 / n

    which is unbiased for normal draws. The error is that of a jackknife over ten blocks of draws:
    it knows that coordinates move together.

    :raises ValueError: fewer than 10 draws, no coordinates, or numbers that are not finite

    Source: 'Tighter Variational Bounds are Not Necessarily Better' (Rainforth et al., arXiv
    1802.04537) for the ratio.

    >>> found = signal_to_noise(0.5 + torch.randn(1000, 20))
    >>> bool((found.ratio - 0.5).abs() < 4 * found.error), bool(found.detected)
    (True, True)
    """
    moments = GradientMoments(len(gradients))
    starts = [-(-b * len(gradients) // NUM_BLOCKS) for b in range(1, NUM_BLOCKS)]
    for block in gradients.detach().flatten(1).tensor_split(starts):
        moments.add(block)
    return moments.ratio()


class GradientMoments:
    """Mean and squared deviations of draws that come one by one, in blocks; in float64.

    Holds twenty vectors of the length of the gradient, however many draws there are.

    :param total: how many draws there will be
    :raises ValueError: fewer than 10

    >>> moments = GradientMoments(20)
    >>> for _ in range(20):
    ...     moments.add(torch.ones(1, 3))
    >>> moments.ratio().by_coordinate  # no noise at all
    tensor([inf, inf, inf], dtype=torch.float64)
    """

    def __init__(self, total: int) -> None:
        if total < NUM_BLOCKS:
            raise ValueError(
                f"A signal-to-noise ratio needs at least {NUM_BLOCKS} draws, got {total}."
            )
        self.total, self.seen = total, 0
        self.blocks: list[_Block] = []

    def add(self, draws: Tensor) -> None:
        """Take draws ``[n, D]`` that belong to one block; a later D may be larger.

        What a draw did not have was 0 in it.
        """
        place = self.seen * NUM_BLOCKS // self.total
        mean = draws.double().mean(0)
        own = _Block(len(draws), mean, (draws - mean).double().square().sum(0))
        if place == len(self.blocks):
            self.blocks.append(own)
        else:
            self.blocks[place] = _joined([self.blocks[place], own])
        self.seen += len(draws)

    def ratio(self) -> SignalToNoise:
        """Return the ratio from all draws so far.

        :raises ValueError: no coordinates; a gradient was not finite
        """
        whole = _joined(self.blocks)
        if not len(whole.mean):
            raise ValueError("The gradient has no coordinates.")
        if not bool(whole.squares.isfinite().all()):
            raise ValueError(
                "The gradient is infinite or not a number in some of the draws, and has no "
                "signal-to-noise ratio. torch.autograd.detect_anomaly() tells where that begins."
            )
        squared, noisy, count = _squared(whole), _is_noisy(whole), len(self.blocks)
        # A coordinate may have all of its noise in the block that is left out.
        left = _squared(_left_out(self.blocks)).nan_to_num(0.0, 0.0)[:, noisy].mean(1)
        spread = ((count - 1) / count * (left - left.mean()).square().sum()).sqrt()
        ratio = _mean_of(squared, noisy).clamp_min(0).sqrt()
        error = spread / (2 * ratio)  # infinite where the ratio is 0
        return SignalToNoise(ratio, error, ratio > CLEAR * error, squared.clamp_min(0).sqrt())


class _Block(NamedTuple):
    """How many draws, their mean, and the sum of their squared deviations from it, ``[D]`` both."""

    size: Any
    mean: Tensor
    squares: Tensor


def _stacked(blocks: Sequence[_Block]) -> _Block:
    """Return sizes ``[b, 1]``, means and squares ``[b, D]``; shorter blocks had zeros."""
    longest = max((block.mean for block in blocks), key=len)
    means, squares = (
        torch.stack([pad(part.to(longest), (0, len(longest) - len(part))) for part in parts])
        for parts in ([b.mean for b in blocks], [b.squares for b in blocks])
    )
    sizes = longest.new_tensor([block.size for block in blocks]).unsqueeze(1)
    return _Block(sizes, means, squares)


def _joined(blocks: Sequence[_Block]) -> _Block:
    """Put the draws of blocks together."""
    sizes, means, squares = _stacked(blocks)
    mean = (sizes * means).sum(0) / sizes.sum()
    total = squares.sum(0) + (sizes * (means - mean).square()).sum(0)
    return _Block(sum(block.size for block in blocks), mean, total)


def _left_out(blocks: Sequence[_Block]) -> _Block:
    """Put all blocks but one together, for each: sizes ``[b, 1]``, ``[b, D]`` the others."""
    sizes, means, squares = _stacked(blocks)
    others = 1 - torch.eye(len(blocks), dtype=means.dtype, device=means.device)
    centre = means.mean(0)  # near all means, so that little is lost in the difference below
    shifts, number = means - centre, others @ sizes
    shift = others @ (sizes * shifts) / number
    between = others @ (sizes * shifts.square()) - number * shift.square()
    return _Block(number, centre + shift, others @ squares + between.clamp_min(0))


def _is_noisy(block: _Block) -> Tensor:
    """Whether a coordinate varies by more than rounding, ``[D]``."""
    rounding = (torch.finfo(torch.float32).eps * block.mean).square()
    return block.squares > block.size * rounding


def _squared(block: _Block) -> Tensor:
    """Return the estimate of the squared ratio of each coordinate, ``[D]``."""
    n = block.size
    estimate = (n - 3) * block.mean.square() / block.squares - 1 / n
    silent = torch.where(block.mean == 0, math.nan, math.inf)
    return torch.where(_is_noisy(block), estimate, silent.to(estimate))


def _mean_of(squared: Tensor, noisy: Tensor) -> Tensor:
    """Return the mean over the coordinates with noise; if there are none, over the others."""
    kept = squared[noisy]
    return kept.mean() if kept.numel() else squared.nanmean()


def log_slope(sizes: Tensor, ratios: Tensor, errors: Tensor) -> tuple[float, float]:
    """Return the slope of ratios over sizes in log-log coordinates, and its standard error.

    Weighted least squares, with the standard errors of the ratios; points that are not finite and
    positive are left out. Both are nan where fewer than two points are left.

    :param sizes: ``[n]``, as are the others

    >>> sizes = torch.tensor([1.0, 4.0, 16.0])
    >>> log_slope(sizes, 3 / sizes.sqrt(), 0.1 * torch.ones(3))[0]
    -0.5
    """
    known = (ratios > 0) & ratios.isfinite() & errors.isfinite()
    if int(known.sum()) < 2:
        return math.nan, math.nan
    x, y = sizes[known].double().log(), ratios[known].double().log()
    # A point without any error would have all the weight.
    weight = (ratios / errors.clamp_min(1e-6 * ratios))[known].double().square()
    centred = x - (weight * x).sum() / weight.sum()
    information = (weight * centred.square()).sum()
    return ((weight * centred * y).sum() / information).item(), information.rsqrt().item()
