"""Likelihoods of pixels: binary ones, and two of grey levels under a location and a scale.

All give log p(x) of an image in nats, so that bits per dimension are its negative over the number
of pixels and log 2. Grey levels k = 0 to L - 1 have k / (L - 1) for their intensity. The Gaussian
scores y = (k + u) / L, with u uniform on [0, 1), by its density in units of a level, whose mean
over u is a lower bound of log p(k) (`A note on the evaluation of generative models`, Theis et al.,
arXiv 1511.01844), so that it may be compared with the discretised logistic.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from benchmarks.tasks.image_sets import SMALL
from pyro_recursive.datasets import dynamic_binarize, fixed_binarize


def levels_of(dataset: str) -> int:
    """Return the grey levels of a pixel; means of four pixels have four times as many steps."""
    if dataset.startswith("digits"):
        return 17
    return 4 * 255 + 1 if dataset.endswith(SMALL) else 256


class GreyLevels(TorchDistribution):
    """Pixels with a location and a scale each, in units of the intensity; drawn by no model.

    ``least`` is the lower limit of a learned scale, in levels, and ``deviation`` the standard
    deviation at scale 1.
    """

    least: ClassVar[float]
    deviation: ClassVar[float]
    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.unit_interval

    def __init__(self, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.loc, self.scale, self.levels = loc, scale, levels
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        return type(self)(self.loc.expand(batch_shape), self.scale, self.levels)


class DequantisedNormal(GreyLevels):
    """A normal density of y = (k + u) / L, in nats of a level."""

    least = 1.0
    deviation = 1.0

    def log_prob(self, value: Tensor) -> Tensor:
        standard = (value - self.loc) / self.scale
        return -0.5 * standard.square() - (self.scale * self.levels * math.sqrt(2 * math.pi)).log()


class DiscretisedLogistic(GreyLevels):
    """The mass of a logistic within half a level of k / (L - 1); the outermost levels have tails.

    Reference: `Improving Variational Inference with Inverse Autoregressive Flow` (Kingma et al.,
    arXiv 1606.04934).
    """

    least = 0.1
    deviation = math.pi / math.sqrt(3)

    def log_prob(self, value: Tensor) -> Tensor:
        half = 0.5 / (self.levels - 1)
        above, below = ((value + side - self.loc) / self.scale for side in (half, -half))
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))
        top, bottom = value > 1 - half, value < half
        width = (-torch.expm1(-2 * half / self.scale)).log()
        zero = value.new_zeros(())
        return (
            torch.where(top, zero, logsigmoid(above))
            + torch.where(bottom, zero, logsigmoid(-below))
            + torch.where(top | bottom, zero, width)
        )


class LocationScale(nn.Module):
    """The output of a network as location of pixels, and a scale for each, learned too.

    A pixel that is the same in nearly all images has its best scale near 0, or near that of the
    noise if dequantised, and log p(x) is then determined by the few images in which it differs:
    scales have a lower limit of a level (Gaussian) or a tenth of one (discretised logistic, which
    gives a pixel in the middle of its level 0.987 there). First locations are the means of
    ``rows``; first scales have their standard deviations, and the limit and a tenth of a level
    more.
    """

    def __init__(self, network: nn.Sequential, rows: Tensor, levels: int, kind: Any) -> None:
        super().__init__()
        self.network, self.levels, self.kind = network, levels, kind
        self.least = kind.least / levels
        network[-1].bias = nn.Parameter(rows.mean(0))
        self.log_scale = nn.Parameter((rows.std(0) / kind.deviation + 0.1 / levels).log())

    def forward(self, z: Tensor) -> GreyLevels:
        return self.kind(self.network(z), self.log_scale.exp() + self.least, self.levels)


def dequantise(x: Tensor, levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Return (k + u) / L for intensities k / (L - 1), with uniform noise u."""
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return (x * (levels - 1) + noise) / levels


def fixed_dequantise(x: Tensor, seed: int, levels: int) -> Tensor:
    """Return what `dequantise` does, the same for the same ``seed``."""
    return dequantise(x, levels, torch.Generator().manual_seed(seed))


class Likelihood(NamedTuple):
    """How images become what a model observes: minibatches, and fixed sets; and the model's."""

    transform: Callable[..., Tensor] | None
    fixed: Callable[..., Tensor]  # of images and a seed
    kind: Any = None  # of `GreyLevels`; none: binary
    levels: int = 2


def likelihood(name: str, dataset: str, rows: Tensor) -> Likelihood:
    """Return a likelihood of the pixels of a data set, with ``rows`` of it."""
    levels = levels_of(dataset)
    steps = rows * (levels - 1)
    if name != "bernoulli" and (steps - steps.round()).abs().max() > 1e-3:
        raise ValueError(f"{dataset} has not {levels} grey levels: add it to levels_of.")
    if name == "gaussian":
        draw, fixed = (partial(each, levels=levels) for each in (dequantise, fixed_dequantise))
        return Likelihood(draw, fixed, DequantisedNormal, levels)
    if name == "logistic":
        return Likelihood(None, lambda x, seed: x, DiscretisedLogistic, levels)
    return Likelihood(dynamic_binarize, fixed_binarize)


LIKELIHOODS = ("bernoulli", "gaussian", "logistic")
