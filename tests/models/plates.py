"""Plates of every kind: nested, crossed, sequential, and latents outside the data plate."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from tests.models.row import (
    GRID,
    GROUPS,
    ITEMS,
    JOINT,
    TRANSPOSED,
    Row,
    data,
    normal,
    observe,
    pair,
    positive,
    real,
    table,
)

# Plates of every kind.


def nested(x: Tensor) -> None:
    """A latent for each group and one for each item: a weight for each group."""
    with pyro.plate("group", x.shape[0], dim=-2):
        w = normal("w", real("mu", 0.3), 1.0)
        with pyro.plate("item", x.shape[1], dim=-1):
            observe(normal("z", w, 0.7), x)


def nested_guide(x: Tensor) -> None:
    with pyro.plate("group", x.shape[0], dim=-2):
        loc = real("a", 0.4) * x.mean(-1, keepdim=True)
        w = normal("w", loc, positive("s", 0.7))
        with pyro.plate("item", x.shape[1], dim=-1):
            normal("z", real("b", 0.5) * w + real("c", 0.3) * x, positive("t", 0.6))


def grid(x: Tensor, dims: tuple[int, int] = (-2, -1)) -> None:
    """Two plates around every site; ``dims`` may leave gaps and come in either order."""
    left, right = dims
    with pyro.plate("row", x.shape[0], dim=left), pyro.plate("column", x.shape[1], dim=right):
        observe(normal("z", real("mu", 0.3), 1.0), placed(x, dims))


def grid_guide(x: Tensor, dims: tuple[int, int] = (-2, -1)) -> None:
    left, right = dims
    with pyro.plate("column", x.shape[1], dim=right), pyro.plate("row", x.shape[0], dim=left):
        normal("z", real("a", 0.4) * placed(x, dims), positive("s", 0.8))


def placed(x: Tensor, dims: tuple[int, int]) -> Tensor:
    """Put the rows and columns of a matrix at two dims."""
    x = x if dims[0] < dims[1] else x.mT
    gap = abs(dims[0] - dims[1]) - 1
    return x.reshape(x.shape[0], *[1] * gap, x.shape[1], *[1] * (-max(dims) - 1))


def crossed(x: Tensor) -> None:
    """A latent for each row and for each column: nothing encloses both."""
    rows, columns = pyro.plate("row", x.shape[0], dim=-2), pyro.plate("column", x.shape[1], dim=-1)
    with rows:
        r = normal("r", real("mu", 0.3), 1.0)
    with columns:
        c = normal("c", 0.0, 1.0)
    with rows, columns:
        observe(r + c, x)


def crossed_guide(x: Tensor) -> None:
    s = positive("s", 0.6)
    with pyro.plate("row", x.shape[0], dim=-2):
        normal("r", real("a", 0.5) * x.mean(1, keepdim=True), s)
    with pyro.plate("column", x.shape[1], dim=-1):
        normal("c", real("b", 0.3) * x.mean(0), s)


def sequential(x: Tensor, twice: bool = False, **plate: Any) -> None:
    """A loop over data; ``twice`` runs over the plate once for the latents, once for the data."""
    mu = real("mu", 0.3)
    loop = pyro.plate("data", len(x), **plate)
    latent = {}
    for i in loop:
        latent[i] = normal(f"z{i}", mu, 1.0)
        if not twice:
            observe(latent[i], x[i], f"x{i}")
    for i in loop if twice else ():
        observe(latent[i], x[i], f"x{i}")


def sequential_guide(x: Tensor, twice: bool = False, **plate: Any) -> None:
    a, s = real("a", 0.4), positive("s", 0.9)
    for i in pyro.plate("data", len(x), **plate):
        normal(f"z{i}", a * x[i] + 0.1 * i, s)


def sequential_global(x: Tensor) -> None:
    w = normal("w", real("mu", 0.3), 1.0)
    for i in pyro.plate("data", len(x)):
        observe(normal(f"z{i}", w, 0.7), x[i], f"x{i}")


def sequential_global_guide(x: Tensor) -> None:
    w = normal("w", real("b", 0.4), positive("t", 0.5))
    for i in pyro.plate("data", len(x)):
        normal(f"z{i}", real("a", 0.4) * x[i] + 0.3 * w, positive("s", 0.6))


def sequential_of_vectorized(x: Tensor) -> None:
    mu, items = real("mu", 0.3), pyro.plate("item", x.shape[1])
    for i in pyro.plate("group", x.shape[0]):
        with items:
            observe(normal(f"z{i}", mu, 1.0), x[i], f"x{i}")


def sequential_of_vectorized_guide(x: Tensor) -> None:
    items = pyro.plate("item", x.shape[1])
    for i in pyro.plate("group", x.shape[0]):
        with items:
            normal(f"z{i}", real("a", 0.4) * x[i], positive("s", 0.9))


def vectorized_of_sequential(x: Tensor) -> None:
    """The same with the loop inside: the order of the dims must not follow the nesting."""
    mu = real("mu", 0.3)
    with pyro.plate("item", x.shape[1]):
        for i in pyro.plate("group", x.shape[0]):
            observe(normal(f"z{i}", mu, 1.0), x[i], f"x{i}")


def vectorized_of_sequential_guide(x: Tensor) -> None:
    with pyro.plate("item", x.shape[1]):
        for i in pyro.plate("group", x.shape[0]):
            normal(f"z{i}", real("a", 0.4) * x[i], positive("s", 0.9))


def sequential_mixed(x: Tensor) -> None:
    """Every other datum has a discrete latent: not every kind of site is in every iteration."""
    for i in pyro.plate("data", len(x)):
        z = normal("z0", 0.0, 1.0) if i == 0 else pyro.sample(f"k{i}", dist.Bernoulli(0.4))
        observe(z + real("mu", 0.3), x[i], f"x{i}")


def sequential_mixed_guide(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        if i == 0:
            normal("z0", real("a", 0.4), positive("s", 0.9))
        else:
            pyro.sample(f"k{i}", dist.Bernoulli(logits=real("b", 0.5) * x[i]))


def deeper(x: Tensor, depth: int) -> None:
    """A model whose plate nesting depends on its arguments."""
    mu = real("mu", 0.3)
    with pyro.plate("data", len(x), dim=-1):
        if depth == 1:
            observe(normal("z", mu, 1.0), x)
        else:
            with pyro.plate("copy", depth, dim=-2):
                observe(normal("z", mu, 1.0), x + torch.arange(1.0 * depth)[:, None])


def deeper_guide(x: Tensor, depth: int) -> None:
    a, s = real("a", 0.4), positive("s", 0.9)
    with pyro.plate("data", len(x), dim=-1):
        if depth == 1:
            normal("z", a * x, s)
        else:
            with pyro.plate("copy", depth, dim=-2):
                normal("z", a * x + torch.arange(1.0 * depth)[:, None], s)


def markov(x: Tensor) -> None:
    """A time series for each datum: ``pyro.markov`` inside a data plate."""
    z, mu = torch.zeros(()), real("mu", 0.3)
    with pyro.plate("data", x.shape[0]):
        for t in pyro.markov(range(x.shape[1])):
            z = normal(f"z{t}", 0.8 * z + mu, 0.7)
            observe(z, x[:, t], f"x{t}")


def markov_guide(x: Tensor) -> None:
    z = torch.zeros(())
    a, b, s = real("a", 0.4), real("b", 0.5), positive("s", 0.6)
    with pyro.plate("data", x.shape[0]):
        for t in pyro.markov(range(x.shape[1])):
            z = normal(f"z{t}", a * x[:, t] + b * z, s)


def unequal(x: Tensor) -> None:
    """Two latents, one below the other in the guide, each with a scale or a mask of its own."""
    with pyro.plate("data", x.shape[0]):
        with poutine.scale(scale=0.3):
            z = normal("z", real("mu", 0.3), 1.0)
        with poutine.mask(mask=torch.tensor([True, False])):
            w = normal("w", z, 0.8)
        observe(z, x[:, 0])
        observe(w, x[:, 1], "y")


def unequal_guide(x: Tensor) -> None:
    with pyro.plate("data", x.shape[0]):
        with poutine.scale(scale=0.3):
            z = normal("z", real("a", 0.4) * x[:, 0], positive("s", 0.8))
        w = dist.Normal(real("b", 0.5) * z + real("c", 0.3) * x[:, 1], positive("t", 0.6))
        pyro.sample("w", w.mask(torch.tensor([True, False])))


# Latents outside the data plate.


def hierarchy(x: Tensor, **plate: Any) -> None:
    """A global and a local latent."""
    w = normal("w", real("mu", 0.3), 1.0)
    with pyro.plate("data", len(x), **plate) as index:
        observe(normal("z", w, 0.8), x[index])


def hierarchy_guide(x: Tensor, **plate: Any) -> None:
    """The local latent's location depends on the global one."""
    w = normal("w", real("c", 0.5), positive("t", 0.6))
    with pyro.plate("data", len(x), **plate) as index:
        normal("z", real("a", 0.5) * x[index] + real("b", 0.3) * w, positive("s", 0.7))


def scales(x: Tensor) -> None:
    """A positive global latent and a real local one, as the autoguides see them."""
    scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
    with pyro.plate("data", len(x)):
        observe(normal("z", real("mu", 0.3), scale), x)


# The table.

GAP, TURNED = (-4, -2), (-1, -3)

ROWS = [
    Row("nested", pair(nested, nested_guide), **GROUPS),
    Row("grid", pair(grid, grid_guide), **GRID),
    Row("grid_with_gap", pair(grid, grid_guide, dims=GAP), **GRID),
    Row("grid_reversed", pair(grid, grid_guide, dims=TURNED), **TRANSPOSED),
    Row("crossed", pair(crossed, crossed_guide), lambda: (table(),), **JOINT),
    Row("sequential", pair(sequential, sequential_guide)),
    Row("sequential_twice", pair(sequential, sequential_guide, twice=True)),
    Row(
        "sequential_subsample",
        pair(sequential, sequential_guide, subsample_size=2),
        plates=(2,),
    ),
    Row("sequential_global", pair(sequential_global, sequential_global_guide), **JOINT),
    Row(
        "sequential_of_vectorized",
        pair(sequential_of_vectorized, sequential_of_vectorized_guide),
        **ITEMS,
    ),
    Row(
        "vectorized_of_sequential",
        pair(vectorized_of_sequential, vectorized_of_sequential_guide),
        **ITEMS,
    ),
    Row("sequential_mixed", pair(sequential_mixed, sequential_mixed_guide), sites="discrete"),
    Row(
        "deeper",
        pair(deeper, deeper_guide),
        lambda: (data(), 1),
        other_args=lambda: (data(), 3),
    ),
    Row("markov", pair(markov, markov_guide), lambda: (table(),), plates=(2,)),
    Row("unequal_scales", pair(unequal, unequal_guide), lambda: (table(),), plates=(2,)),
    Row("hierarchy", pair(hierarchy, hierarchy_guide), **JOINT),
]
