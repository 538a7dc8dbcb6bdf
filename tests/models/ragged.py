"""Ragged sequences: a linear Gaussian deep Markov model, and its latents' exact posterior.

``x`` is ``[rows, steps, 2]``; the steps from ``lengths`` on are padding, masked in the model.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from tests.models.row import Row, pair, positive, real

KEPT, STEP, NOISE = 0.8, 0.6, 0.9  # z_t ~ N(KEPT z_(t-1), STEP), x_t ~ N(z_t, NOISE)


def sequences() -> tuple[Tensor, Tensor]:
    x = torch.sin(torch.arange(24.0) ** 1.5).reshape(4, 3, 2)
    return x, torch.tensor([3, 1, 2, 3])


def steps(x: Tensor, lengths: Tensor) -> Any:
    """Yield each step and the rows that have it, ``[rows, 1]``."""
    for t in range(x.shape[1]):
        yield t, (t < lengths).unsqueeze(-1)


def ragged(x: Tensor, lengths: Tensor, annealing: float | None = None) -> None:
    z, mu = torch.zeros(2), 0.0 if annealing is None else real("mu", 0.3)
    with pyro.plate("data", len(x)):
        for t, inside in steps(x, lengths):
            with poutine.scale(scale=annealing or 1.0):
                normal = dist.Normal(KEPT * z + mu, STEP).mask(inside)
                z = pyro.sample(f"z{t}", normal.to_event(1))
            observed = dist.Normal(z, NOISE).mask(inside)
            pyro.sample(f"x{t}", observed.to_event(1), obs=x[:, t])


def ragged_guide(x: Tensor, lengths: Tensor, annealing: float) -> None:
    """Filters the data, with the mask and the scale of the model."""
    z, a, b, s = torch.zeros(2), real("a", 0.4), real("b", 0.5), positive("s", 0.6)
    with pyro.plate("data", len(x)), poutine.scale(scale=annealing):
        for t, inside in steps(x, lengths):
            normal = dist.Normal(a * x[:, t] + b * z, s).mask(inside)
            z = pyro.sample(f"z{t}", normal.to_event(1))


def smoother(x: Tensor, lengths: Tensor, masked: bool = True) -> None:
    """Samples the exact posterior, and padding from anywhere, with or without the model's mask."""
    later = [(torch.zeros(()), torch.zeros(()))]  # -log p(data after t | z) = u z ** 2 / 2 - v z
    for t, inside in reversed(list(steps(x, lengths))):
        u, v = later[0]
        u, v = inside * (u + NOISE**-2), inside * (v + x[:, t] / NOISE**2)
        shrink = KEPT / (1 + u * STEP**2)
        later.insert(0, (KEPT * shrink * u, shrink * v))
    z, a, s = torch.zeros(2), real("a", 1.0), positive("s", 1.0)
    with pyro.plate("data", len(x)):
        for t, inside in steps(x, lengths):
            u, v = later[t + 1]
            precision = STEP**-2 + NOISE**-2 + u
            loc = a * (KEPT * z / STEP**2 + x[:, t] / NOISE**2 + v) / precision
            loc = torch.where(inside, loc, 5.0 * torch.ones(()))
            normal = dist.Normal(loc, s * precision**-0.5 * torch.where(inside, 1.0, 7.0))
            z = pyro.sample(f"z{t}", (normal.mask(inside) if masked else normal).to_event(1))


def ragged_evidence(x: Tensor, lengths: Tensor) -> Tensor:
    """log p(x) of each row, from the joint normal of the steps that it has."""
    rows = []
    for row, length in zip(x, lengths.tolist(), strict=True):
        powers = torch.arange(length)[:, None] - torch.arange(length)
        factor = STEP * torch.where(powers >= 0, KEPT ** powers.abs(), 0.0)
        covariance = factor @ factor.mT + NOISE**2 * torch.eye(length)
        of_steps = dist.MultivariateNormal(torch.zeros(length), covariance)
        rows.append(of_steps.log_prob(row[:length].mT).sum())
    return torch.stack(rows)


ROWS = [
    Row("ragged", pair(ragged, ragged_guide, annealing=0.3), sequences),
    Row("exact_ragged", pair(ragged, smoother), sequences, evidence=ragged_evidence),
]
