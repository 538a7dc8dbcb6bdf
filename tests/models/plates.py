"""Plates of every kind: nested, crossed, sequential, and latents outside the data plate.

Where the guide of a model is its exact posterior, the row has the evidence.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from tests.models import row as rows
from tests.models.data_plate import at
from tests.models.row import Programs, Row, data, mask, normal, observe, pair, positive, real, table

# Independent latents: a function yields the sites' plates, names and data.


def independent(layout: Callable[..., Iterator], is_exact: bool = False) -> Programs:
    """z ~ N(mu, 1) and x ~ N(z, 1); exact is mu = 0 with the guide N(x / 2, sqrt(1 / 2))."""
    slope, scale = (0.5, 0.5**0.5) if is_exact else (0.4, 0.9)

    def model(x: Tensor, *args: Any, **plate: Any) -> None:
        mu = 0.0 if is_exact else real("mu", 0.3)
        for name, value in layout(x, *args, **plate):
            observe(normal(f"z{name}", mu, 1.0), value, f"x{name}")

    def guide(x: Tensor, *args: Any, **plate: Any) -> None:
        a, s = real("a", slope), positive("s", scale)
        for name, value in layout(x, *args, **plate):
            normal(f"z{name}", a * value, s)

    return model, guide


def in_no_plate(x: Tensor) -> Iterator:
    yield "", x


def in_plate(x: Tensor, dim: int = -1, **plate: Any) -> Iterator:
    with pyro.plate("data", len(x), dim=dim, **plate) as index:
        yield "", at(x, index, dim)


def in_grid(x: Tensor, dims: tuple[int, int] = (-2, -1)) -> Iterator:
    """Two plates around every site; ``dims`` may leave gaps and come in either order."""
    left, right = dims
    with pyro.plate("row", x.shape[0], dim=left), pyro.plate("column", x.shape[1], dim=right):
        x = x if left < right else x.mT
        gap = abs(left - right) - 1
        yield "", x.reshape(x.shape[0], *[1] * gap, x.shape[1], *[1] * (-max(dims) - 1))


def in_loop(x: Tensor, **plate: Any) -> Iterator:
    for i in pyro.plate("data", len(x), **plate):
        yield i, x[i]


def in_loop_of_plate(x: Tensor) -> Iterator:
    items = pyro.plate("item", x.shape[1])
    for i in pyro.plate("group", x.shape[0]):
        with items:
            yield i, x[i]


def in_plate_of_loop(x: Tensor) -> Iterator:
    """The order of the weights' dims must not follow the nesting."""
    with pyro.plate("item", x.shape[1]):
        for i in pyro.plate("group", x.shape[0]):
            yield i, x[i]


def deeper(x: Tensor, depth: int) -> Iterator:
    """The plate nesting depends on the arguments."""
    with pyro.plate("data", len(x), dim=-1):
        if depth == 1:
            yield "", x
        else:
            with pyro.plate("copy", depth, dim=-2):
                yield "", x + torch.arange(1.0 * depth)[:, None]


sequential, sequential_guide = independent(in_loop)


# Latents that depend on each other.


def nested(x: Tensor) -> None:
    """A latent for each group and one for each item: a weight for each group."""
    with pyro.plate("group", x.shape[0], dim=-2):
        w = normal("w", real("mu", 0.3), 1.0)
        with pyro.plate("item", x.shape[1], dim=-1):
            observe(normal("z", w, 0.7), x)


def crossed(x: Tensor) -> None:
    """A latent for each row and for each column: nothing encloses both."""
    in_rows, in_columns = pyro.plate("row", len(x), dim=-2), pyro.plate("column", x.shape[1])
    with in_rows:
        r = normal("r", real("mu", 0.3), 1.0)
    with in_columns:
        c = normal("c", 0.0, 1.0)
    with in_rows, in_columns:
        observe(r + c, x)


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


# Exact posteriors and their evidence.


def evidence(x: Tensor) -> Tensor:
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def exact_groups(x: Tensor) -> None:
    """One latent for each group of items; the items' plate is summed inside each weight."""
    with pyro.plate("group", x.shape[0], dim=-2):
        z = normal("z", 0.0, 1.0)
        with pyro.plate("item", x.shape[1], dim=-1):
            observe(z, x)


def exact_groups_guide(x: Tensor) -> None:
    count = x.shape[1] + 1
    with pyro.plate("group", x.shape[0], dim=-2):
        loc = real("a", 1.0) * x.sum(-1, keepdim=True) / count
        normal("z", loc, positive("s", count**-0.5))


def exact_unsized(x: Tensor, level: bool = False) -> None:
    """A plate without a size; with ``level`` also a latent that all of its entries share."""
    with pyro.plate("data"):
        w = normal("w", 0.0, 1.0) if level else torch.zeros(())
        z = normal("z", torch.zeros(len(x)), 1.0)
        observe(z + w, x)


def exact_unsized_guide(x: Tensor) -> None:
    with pyro.plate("data"):
        normal("z", real("a", 0.5) * x, positive("s", 0.5**0.5))


def exact_level_guide(x: Tensor) -> None:
    """The posterior of w, of scale 2 / (N + 2), and that of z given w."""
    precision = 1 + len(x) / 2
    w = normal("w", real("c", 0.5) * x.sum() / precision, positive("t", precision**-0.5))
    with pyro.plate("data"):
        normal("z", real("a", 0.5) * (x - w), positive("s", 0.5**0.5))


def exact_global(x: Tensor) -> None:
    """One latent for all data: a single weight, and nothing to warn about."""
    z = normal("z", 0.0, 1.0)
    with pyro.plate("data", len(x)):
        observe(z, x)


def exact_global_guide(x: Tensor) -> None:
    count = len(x) + 1
    normal("z", real("a", 1.0) * x.sum() / count, positive("s", count**-0.5))


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
    loc = torch.where(mask(), real("a", 0.5) * x, torch.zeros(()))
    scale = torch.where(mask(), positive("s", 0.5**0.5), torch.ones(()))
    with pyro.plate("data", len(x)):
        normal("z", loc, scale)


def laid_out(layout: Callable, is_exact: bool = False, **options: Any) -> Callable[[], Programs]:
    return lambda: independent(partial(layout, **options) if options else layout, is_exact)


TURNED = (-1, -3)
PAIRS: dict[str, Any] = {"args": lambda: (table(),), "plates": (2,)}
LATER: dict[str, Any] = {"args": lambda: (data(), 1), "other_args": lambda: (data(), 3)}

ROWS = [
    Row("grid", laid_out(in_grid), **rows.GRID),
    Row("grid_reversed", laid_out(in_grid, dims=TURNED), **rows.TRANSPOSED),
    Row("sequential", laid_out(in_loop)),
    Row("sequential_subsample", laid_out(in_loop, subsample_size=2), plates=(2,)),
    Row("sequential_of_vectorized", laid_out(in_loop_of_plate), **rows.ITEMS),
    Row("vectorized_of_sequential", laid_out(in_plate_of_loop), **rows.ITEMS),
    Row("deeper", laid_out(deeper), **LATER),
    Row("nested", rows.guided(nested, AutoNormal, init_scale=0.7), **rows.GROUPS),
    Row("crossed", rows.guided(crossed, AutoNormal, init_scale=0.7), **rows.TABLE, **rows.JOINT),
    Row("markov", pair(markov, markov_guide), **PAIRS),
    Row("unequal_scales", pair(unequal, unequal_guide), **PAIRS),
    Row("hierarchy", pair(hierarchy, hierarchy_guide), **rows.JOINT),
    Row("level", pair(partial(exact_unsized, level=True), exact_level_guide), **rows.JOINT),
]
SCALAR: dict[str, Any] = {**rows.ALONE, "args": lambda: (data()[0],), "evidence": evidence}
BATCH = torch.tensor(rows.INDEX)
ROWS += [
    Row("exact_no_plate", laid_out(in_no_plate, True), **SCALAR),
    Row("exact_plate", laid_out(in_plate, True), evidence=evidence),
    Row(
        "exact_subsample",
        laid_out(in_plate, True, subsample=BATCH),
        plates=(2,),
        evidence=lambda x: evidence(x[BATCH]),
    ),
    Row(
        "exact_grid_reversed",
        laid_out(in_grid, True, dims=TURNED),
        evidence=lambda x: evidence(x.mT),
        **rows.TRANSPOSED,
    ),
    Row("exact_loop_of_plate", laid_out(in_loop_of_plate, True), evidence=evidence, **rows.ITEMS),
]
ROWS += [
    Row(f"exact_{name}", pair(*programs), evidence=exact_evidence, **options)
    for name, programs, exact_evidence, options in (
        ("groups", (exact_groups, exact_groups_guide), joint_evidence, rows.GROUPS),
        ("global", (exact_global, exact_global_guide), joint_evidence, rows.ALONE),
        ("unsized", (exact_unsized, exact_unsized_guide), evidence, {}),
        ("masked", (exact_masked, exact_masked_guide), lambda x: evidence(x) * mask(), {}),
    )
]
