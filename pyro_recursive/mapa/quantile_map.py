"""The prior of one latent that has the quantiles of its codes: a monotone map of a normal."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform

from pyro_recursive.mapa.recovered import RecoveredPrior, check_spread
from pyro_recursive.tracing.arguments import check_at_least

__all__ = ["QuantileMap", "QuantilePrior"]


class QuantileMap(Transform):
    """An increasing, piecewise linear function through given knots, with linear tails.

    ``inputs`` and ``outputs`` are ``[K]``, both strictly increasing; the first and the last of the
    ``slopes`` ``[K + 1]`` are those of the tails, the others those between two knots.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, inputs: Tensor, outputs: Tensor, tails: Tensor) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        inner = outputs.diff() / inputs.diff()
        self.slopes = torch.cat([tails[:1], inner, tails[1:]])

    def _call(self, x: Tensor) -> Tensor:
        piece = _piece(x, self.inputs)
        knot = (piece - 1).clamp_min(0)
        return self.outputs[knot] + self.slopes[piece] * (x - self.inputs[knot])

    def _inverse(self, y: Tensor) -> Tensor:
        piece = _piece(y, self.outputs)
        knot = (piece - 1).clamp_min(0)
        return self.inputs[knot] + (y - self.outputs[knot]) / self.slopes[piece]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logarithm of the slope at ``x``."""
        return self.slopes[_piece(y, self.outputs)].log()


class QuantilePrior(RecoveredPrior):
    """``z = h(w)`` with ``w ~ N(0, 1)`` and ``h`` the empirical quantile function of the codes.

    ``h`` takes ``Phi^-1((r - 1/2) / N)`` to the r-th smallest code (with weights, the middle of a
    code's share of them) and is linear between. Equal codes are one knot with all of their weight,
    which lies half way to the neighbours on both sides then. Beyond the first and last code the
    slope is the mean one of the outermost ``sqrt(K)`` of the K knots.

    With all codes as knots the density, the inverse of a gap between two neighbours, is as jagged
    as these: it is meant for what comes out of a decoder with noise, not to be looked at. Its
    log-density of new codes is 0.42 nats (one less Euler's constant) below that of the true one.
    ``knots`` fewer than codes, at evenly spaced quantiles, are smoother: 10 codes a knot cost about
    0.05 nats.
    """

    kind = "copula"
    inputs: Tensor
    outputs: Tensor
    tails: Tensor

    def __init__(self, codes: Tensor, log_weights: Tensor, *, knots: int | None = None) -> None:
        super().__init__(1, len(codes))
        if codes.shape[1] != 1:
            raise ValueError(
                f"kind='copula' is for codes of one number, and these are {list(codes.shape)}: use "
                "'flow' or 'kde'."
            )
        check_spread(codes, self.kind)
        inputs, outputs = _quantiles(codes[:, 0].double(), log_weights.double())
        if knots is not None:
            check_at_least(2, knots=knots)
            whole = QuantileMap(inputs, outputs, _tails(inputs, outputs))
            middles = (torch.arange(knots).to(inputs) + 0.5) / knots
            inputs = torch.special.ndtri(middles)
            outputs = whole(inputs)
        inputs, outputs = _increasing(inputs.to(codes.dtype), outputs.to(codes.dtype))
        self.register_buffer("inputs", inputs)
        self.register_buffer("outputs", outputs)
        self.register_buffer("tails", _tails(inputs, outputs))

    def forward(self) -> Any:
        """Return the distribution of ``h(w)``, batch ``[]`` and event ``[1]``."""
        normal = dist.Normal(torch.zeros_like(self.inputs[:1]), torch.ones_like(self.inputs[:1]))
        return dist.TransformedDistribution(normal.to_event(1), [self._map()])

    def from_normal(self, noise: Tensor) -> Tensor:
        """Return ``h(w)``, ``[...]`` to ``[...]``."""
        return self._map()(noise.to(self.inputs.dtype))

    def _map(self) -> QuantileMap:
        return QuantileMap(self.inputs, self.outputs, self.tails)


def _piece(value: Tensor, knots: Tensor) -> Tensor:
    """Return how many knots are below each value."""
    return torch.bucketize(value.detach().contiguous(), knots)


def _quantiles(codes: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct codes in order and the standard normals of the same quantile."""
    values, place = codes.unique(return_inverse=True)
    weights = torch.zeros_like(values).index_add_(0, place, log_weights.exp())
    below, above = weights.cumsum(0) - weights / 2, weights.flip(0).cumsum(0).flip(0) - weights / 2
    # The nearer tail, where a quantile close to one would have lost its digits.
    inputs = torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above))
    return inputs, values


def _increasing(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out the knots that do not differ from the one before in both numbers."""
    finite = inputs.isfinite()  # the weights of the others are too small to matter
    inputs, outputs = inputs[finite], outputs[finite]
    differ = (inputs.diff() > 0) & (outputs.diff() > 0)
    if not differ.any():
        raise ValueError("Nearly all of the weight is on equal codes: no quantile map follows.")
    kept = torch.cat([differ.new_ones(1), differ])
    return inputs[kept], outputs[kept]


def _tails(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the slopes of both tails, ``[2]``."""
    last = len(inputs) - 1
    width = min(last, math.isqrt(len(inputs)))
    low = (outputs[width] - outputs[0]) / (inputs[width] - inputs[0])
    high = (outputs[last] - outputs[last - width]) / (inputs[last] - inputs[last - width])
    return torch.stack([low, high])
