"""Models whose guide is the exact posterior, and their evidence.

z ~ N(0, 1) and x ~ N(z, 1), so that z | x ~ N(x / 2, 1 / 2).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from tests.models.data_plate import at
from tests.models.plates import placed
from tests.models.row import (
    ALONE,
    GRID,
    GROUPS,
    INDEX,
    TRANSPOSED,
    Programs,
    Row,
    data,
    mask,
    normal,
    observe,
    pair,
    positive,
    real,
    table,
)


def evidence(x: Tensor) -> Tensor:
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def exact(layout: Callable[[Tensor], Iterator]) -> Callable[[], Programs]:
    """Make a model and its posterior from a function that yields the sites' plates and data."""

    def model(x: Tensor) -> None:
        for name, value in layout(x):
            observe(normal(f"z{name}", 0.0, 1.0), value, f"x{name}")

    def guide(x: Tensor) -> None:
        half, scale = real("half", 0.5), positive("scale", 0.5**0.5)
        for name, value in layout(x):
            normal(f"z{name}", half * value, scale)

    return lambda: (model, guide)


def in_no_plate(x: Tensor) -> Iterator:
    yield "", x


def in_plate(x: Tensor, dim: int = -1, **plate: Any) -> Iterator:
    with pyro.plate("data", len(x), dim=dim, **plate) as index:
        yield "", at(x, index, dim)


def in_grid(x: Tensor, dims: tuple[int, int]) -> Iterator:
    left, right = dims
    with pyro.plate("row", x.shape[0], dim=left), pyro.plate("column", x.shape[1], dim=right):
        yield "", placed(x, dims)


def in_loop(x: Tensor) -> Iterator:
    for i in pyro.plate("data", len(x)):
        yield i, x[i]


def in_loop_of_plate(x: Tensor) -> Iterator:
    columns = pyro.plate("column", x.shape[1])
    for i in pyro.plate("row", x.shape[0]):
        with columns:
            yield i, x[i]


def exact_groups(x: Tensor) -> None:
    """One latent for each group of items; the items' plate is summed inside each weight."""
    with pyro.plate("group", x.shape[0], dim=-2):
        z = normal("z", 0.0, 1.0)
        with pyro.plate("item", x.shape[1], dim=-1):
            observe(z, x)


def exact_groups_guide(x: Tensor) -> None:
    count = x.shape[1] + 1
    with pyro.plate("group", x.shape[0], dim=-2):
        loc = real("half", 1.0) * x.sum(-1, keepdim=True) / count
        normal("z", loc, positive("scale", count**-0.5))


def exact_global(x: Tensor) -> None:
    """One latent for all data: a single weight, and nothing to warn about."""
    z = normal("z", 0.0, 1.0)
    with pyro.plate("data", len(x)):
        observe(z, x)


def exact_global_guide(x: Tensor) -> None:
    count = len(x) + 1
    normal("z", real("half", 1.0) * x.sum() / count, positive("scale", count**-0.5))


def joint_evidence(x: Tensor) -> Tensor:
    """log p(x) of the last dim, whose entries share one latent."""
    size = x.shape[-1]
    return dist.MultivariateNormal(torch.zeros(size), torch.eye(size) + 1.0).log_prob(x)


def exact_masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = normal("z", 0.0, 1.0)
        with poutine.mask(mask=mask()):
            observe(z, x)


def exact_masked_guide(x: Tensor) -> None:
    loc = torch.where(mask(), real("half", 0.5) * x, torch.zeros(()))
    scale = torch.where(mask(), positive("scale", 0.5**0.5), torch.ones(()))
    with pyro.plate("data", len(x)):
        normal("z", loc, scale)


# The table.


def of_data() -> Tensor:
    return evidence(data())


def of_table() -> Tensor:
    return evidence(table())


ROWS = [
    Row(
        "exact_no_plate",
        exact(in_no_plate),
        lambda: (data()[0],),
        evidence=lambda: evidence(data()[0]),
        **ALONE,
    ),
    Row("exact_plate", exact(in_plate), evidence=of_data),
    Row("exact_far_dim", exact(partial(in_plate, dim=-3)), evidence=of_data),
    Row(
        "exact_subsample",
        exact(partial(in_plate, subsample=torch.tensor(INDEX))),
        plates=(2,),
        evidence=lambda: evidence(data()[list(INDEX)]),
    ),
    Row("exact_grid", exact(partial(in_grid, dims=(-2, -1))), evidence=of_table, **GRID),
    Row(
        "exact_grid_reversed",
        exact(partial(in_grid, dims=(-1, -3))),
        evidence=lambda: evidence(table().mT),
        **TRANSPOSED,
    ),
    Row("exact_loop", exact(in_loop), evidence=of_data),
    Row("exact_loop_of_plate", exact(in_loop_of_plate), evidence=of_table, **GRID),
    Row(
        "exact_groups",
        pair(exact_groups, exact_groups_guide),
        evidence=lambda: joint_evidence(table()),
        **GROUPS,
    ),
    Row(
        "exact_global",
        pair(exact_global, exact_global_guide),
        evidence=lambda: joint_evidence(data()),
        **ALONE,
    ),
    Row(
        "exact_masked",
        pair(exact_masked, exact_masked_guide),
        evidence=lambda: evidence(data()) * mask(),
    ),
]
