"""Deterministic expectations: Gauss-Hermite grids, and the scalar conjugate model on them.

``x = 1.1; z ~ N(mu, 1), x | z ~ N(z, 1), q = N(m, s)`` with ``mu, m, s = 0.3, 0.2, 0.9`` and
``z = m + s * eps``. Every expectation over ``eps`` in R^K is a sum over a tensor grid, so that it
has no Monte Carlo error; two programs of separate authorship agreed on the tables in the tests.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

X, MU, LOC, SCALE = 1.1, 0.3, 0.2, 0.9
LOG_EVIDENCE = -1.4255121235


class Grid(NamedTuple):
    """Nodes ``[K, nodes ** K]`` of standard normals and the weights ``[nodes ** K]``."""

    eps: Tensor
    weight: Tensor


def normal_grid(size: int, nodes: int = 48) -> Grid:
    """Return the tensor Gauss-Hermite grid in ``size`` dimensions."""
    return tensor_grid(*map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(nodes)), size)


def tensor_grid(points: Tensor, weights: Tensor, size: int) -> Grid:
    """Return a rule for one dimension in ``size`` of them; its weights sum up to one."""
    eps = torch.stack(torch.meshgrid(*[points] * size, indexing="ij")).flatten(1)
    weight = torch.stack(torch.meshgrid(*[weights] * size, indexing="ij")).prod(0).flatten()
    return Grid(eps, weight / weight.sum())


def log_normal(x: Tensor | float, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    """Return the log-density of a normal."""
    standard = (x - loc) / torch.as_tensor(scale)
    return -0.5 * standard**2 - torch.log(torch.as_tensor(scale)) - 0.5 * np.log(2 * np.pi)


class Conjugate(NamedTuple):
    """Everything the three-coefficient rule needs, on the grid; ``[1, K, points]`` tensors."""

    log_weights: Tensor
    path: Tensor  # d log w / d z with the density's parameters frozen
    d_value: Tensor  # d z / d (m, s)
    d_density: Tensor  # d log q / d (m, s) at fixed z
    d_model: Tensor  # d log p / d mu at fixed z


def conjugate(eps: Tensor) -> Conjugate:
    """Return the conjugate model's derivatives, by hand, for noise ``eps`` of ``[K, points]``."""
    z = LOC + SCALE * eps
    log_p = log_normal(z, MU, 1.0) + log_normal(X, z, 1.0)
    log_w = log_p - log_normal(z, LOC, SCALE)
    path = -(z - MU) + (X - z) + (z - LOC) / SCALE**2
    d_value = torch.stack([torch.ones_like(eps), eps])
    d_density = torch.stack([(z - LOC) / SCALE**2, (eps**2 - 1) / SCALE])
    return Conjugate(log_w[None], path[None], d_value[:, None], d_density[:, None], (z - MU)[None])


def minimise(
    function: Callable[[Tensor], Tensor], starts: Sequence[Tensor]
) -> tuple[float, Tensor]:
    """Return the lowest of the minima that a deterministic optimiser finds, and where it is."""
    found = []
    for start in starts:
        point = start.clone().requires_grad_()
        lbfgs = torch.optim.LBFGS([point], max_iter=300, line_search_fn="strong_wolfe")

        def closure(point: Tensor = point, lbfgs: Any = lbfgs) -> Tensor:
            lbfgs.zero_grad()
            value = function(point)
            value.backward()
            return value

        lbfgs.step(closure)
        found.append((function(point).item(), point.detach()))
    return min(found, key=lambda pair: pair[0])
