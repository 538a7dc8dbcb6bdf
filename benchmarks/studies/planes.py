"""Posteriors of two latents on a grid: exact log p(x), the number of modes, and pictures.

The control of what the guides say: with two latents the integral over the latents is a sum over a
grid, and a posterior with several modes shows. A grid is wide enough for what is `DEPTH` nats below
the maximum, and twice as fine as another one that has the same integral within `CLOSE` nats; an
image for which there is none is left out, with NaN as log p(x). Two latents are few for images:
parts of the data that are near in pixels lie apart in the plane, and the reverse. In tables, "KL to
the posterior" is the exact log p(x) less the ELBO, and "several modes" the share of the images
whose posterior has them.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.nn.functional import max_pool2d

from benchmarks.report import Column, Results, color, figure, spread
from benchmarks.run import Method, Settings, Task

POINTS, WIDTH = 161, 6.0  # a side; the first grid is from -6 to 6
MOST_POINTS, MOST_WIDTH = 800, 96.0
DEPTH = 12.0  # nats below the maximum, down to which the last grid reaches
# A grid with the spacing s has a point that is s**2 / (4 sd**2) nats below a mode, or less: the
# first one has to show the modes of a standard deviation of 0.01.
FIRST_DEPTH = DEPTH + 14.0
CLOSE = 0.01  # nats, between log integrals of two grids
LEAST_MODE = 0.05  # a mode's density, as a part of the highest
ROWS, PICTURED = 30, 4  # test images, and those of them that have the most modes
CHUNK = 4096
Run = dict[str, Any]


def _cell(of: Callable[[Run], Tensor]) -> Column:
    def cell(name: str, results: Results) -> str:
        runs = results["runs"][name].values()
        return spread(torch.tensor([float(of(run).nanmean()) for run in runs if "plane" in run]))

    return cell


def _several(run: Run) -> Tensor:
    several = (torch.tensor(run["plane"]["modes"]) > 1).double()
    return several.where(torch.tensor(run["plane"]["log_p"]).isfinite(), torch.nan)


def _divergence(run: Run) -> Tensor:
    exact = torch.tensor(run["plane"]["log_p"])
    return exact - torch.tensor(run["test"]["elbo"][: len(exact)])


PLANE_COLUMNS: dict[str, Column] = {
    "KL to the posterior": _cell(_divergence),
    "several modes": _cell(_several),
}


class Grid(NamedTuple):
    """A log-density ``[y, x]`` at all pairs of coordinates, and the logarithm of its integral.

    ``difference`` is that of the log integrals of this grid and of one half as fine.
    """

    x: Tensor
    y: Tensor
    values: Tensor
    log_integral: float
    difference: float = math.nan

    @property
    def cell(self) -> float:
        """The area that each point stands for."""
        return _spacing(self.x) * _spacing(self.y)

    @property
    def points(self) -> Tensor:
        """All points, ``[y * x, 2]``."""
        return torch.cartesian_prod(self.y, self.x).flip(1)

    @property
    def modes(self) -> int:
        """The number of local maxima that are high enough."""
        highest = max_pool2d(self.values[None, None], 3, stride=1, padding=1)[0, 0]
        least = self.values.max() + torch.tensor(LEAST_MODE).log()
        return int(((self.values == highest) & (self.values >= least)).sum())


def find_grid(log_density: Callable[[Tensor], Tensor]) -> Grid:
    """Return a grid over where a density in the plane is, found with coarser ones.

    ``log_density`` maps points ``[n, 2]`` to ``[n]``. The log integral is NaN where no grid is wide
    and fine enough.
    """
    width = WIDTH
    grid, sides = _look(log_density, (_side(-width, width),) * 2, FIRST_DEPTH)
    while sides is None and width < MOST_WIDTH:
        width *= 2
        grid, sides = _look(log_density, (_side(-width, width),) * 2, FIRST_DEPTH)
    if sides is not None:
        grid, sides = _look(log_density, sides, DEPTH)
    while sides is not None and max(map(len, sides)) <= MOST_POINTS:
        before = grid.log_integral
        grid, sides = _look(log_density, sides, DEPTH)
        grid = grid._replace(difference=grid.log_integral - before)
        if sides is not None and abs(grid.difference) <= CLOSE:
            return grid
    return grid._replace(log_integral=math.nan)


def _look(
    log_density: Callable[[Tensor], Tensor], sides: tuple[Tensor, Tensor], depth: float
) -> tuple[Grid, tuple[Tensor, Tensor] | None]:
    """Return a grid, and x and y of one twice as fine where the density is high.

    That is within ``depth`` of the maximum; None if it is so high at an edge.
    """
    grid = _grid(log_density, *sides)
    inside, next_sides = grid.values > grid.values.max() - depth, list[Tensor]()
    for side, flags in zip(sides, (inside.any(0), inside.any(1)), strict=True):
        if flags[0] or flags[-1]:
            return grid, None
        margin = 2 * _spacing(side)
        low, high = float(side[flags].min()) - margin, float(side[flags].max()) + margin
        next_sides.append(_side(low, high, _spacing(side) / 2))
    return grid, (next_sides[0], next_sides[1])


def _side(low: float, high: float, spacing: float = math.inf) -> Tensor:
    # An odd number: the centre of a symmetric density is one point, not two that are equal.
    points = max(POINTS, 2 * math.ceil((high - low) / spacing / 2) + 1)
    return torch.linspace(low, high, points, dtype=torch.float64)


def _spacing(side: Tensor) -> float:
    return float(side[-1] - side[0]) / (len(side) - 1)


def _grid(log_density: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Grid:
    empty = Grid(x, y, torch.empty(0), 0.0)
    found = torch.cat([log_density(part) for part in empty.points.split(CHUNK)])
    values = found.double().cpu().reshape(len(y), len(x))
    return empty._replace(
        values=values, log_integral=float(values.logsumexp((0, 1))) + math.log(empty.cell)
    )


def log_joint(method: Method, row: Tensor, points: Tensor) -> Tensor:
    """Return log p(x, z) of an image ``[pixels]`` at points ``[n, 2]``, ``[n]``."""
    points = points.to(row)
    model = poutine.condition(method.vae.model, {"z": points})
    trace = poutine.trace(model).get_trace(row.expand(len(points), -1))
    trace.compute_log_prob()
    return trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]


def log_guide(method: Method, row: Tensor, points: Tensor) -> Tensor:
    """Return log w + log q of each component, ``[n, M]``; M is 1 of a guide that has none."""
    guide, points = method.guide, points.to(row)
    args = (row.expand(len(points), -1),)
    guide.get_ready(args, {})
    with poutine.block():
        posterior = guide.posterior(guide.groups[-1], guide.new_call(args, {}))
        if hasattr(posterior, "table"):
            return posterior.table(points) + posterior.log_weights
        return posterior.log_prob(points).unsqueeze(-1)


def with_plane(
    found: dict[str, Any], method: Method, task: Task, settings: Settings
) -> dict[str, Any]:
    """Return the scores of a method and, where it has two latents, those on a grid."""
    return found | {"plane": plane(method, task)} if settings.latent == 2 else found


@torch.no_grad()
def plane(method: Method, task: Task) -> dict[str, Any]:
    """Return log p(x) and the number of modes of some test images; draw a picture of a few.

    And the difference in log p(x) to a grid half as fine.
    """
    rows = task.test[:ROWS]
    grids = [find_grid(partial(log_joint, method, row)) for row in rows]
    modes = [grid.modes for grid in grids]
    if method.evaluated is not None:
        order = sorted(range(len(rows)), key=lambda n: -modes[n])[:PICTURED]
        name = method.evaluated.name.removesuffix(".scores.pt")
        path = method.evaluated.with_name(f"{name}.png")
        draw(method, {n: (rows[n], grids[n]) for n in order}, path)
    return {
        "log_p": [round(grid.log_integral, 4) for grid in grids],
        "difference": [round(grid.difference, 4) for grid in grids],
        "modes": modes,
    }


def draw(method: Method, chosen: dict[int, tuple[Tensor, Grid]], path: Path) -> None:
    """Draw an image, its posterior, the components and the whole of the guide, a row for each."""
    with figure(path, len(chosen), 4, figsize=(13, 3.2 * len(chosen))) as (_, axes):
        for panels, (number, (row, grid)) in zip(axes, chosen.items(), strict=True):
            image, posterior, parts, whole = panels
            side = round(len(row) ** 0.5)
            image.imshow(row.cpu().reshape(side, side).numpy(), cmap="gray_r")
            image.set(title=f"test image {number}", xticks=[], yticks=[])
            table = torch.cat([log_guide(method, row, part) for part in grid.points.split(CHUNK)])
            density = table.double().cpu().exp().reshape(*grid.values.shape, -1)
            exact = (grid.values - grid.values.max()).exp().numpy()
            extent = [*map(float, (grid.x[0], grid.x[-1], grid.y[0], grid.y[-1]))]
            options: dict[str, Any] = {"origin": "lower", "extent": extent, "aspect": "auto"}
            posterior.imshow(exact, **options)
            posterior.set_title(f"posterior, modes: {grid.modes}")
            whole.imshow(density.sum(-1).numpy(), **options)
            whole.set_title("guide")
            parts.imshow(exact, alpha=0.4, **options)
            for m, part in enumerate(density.unbind(-1)):
                levels = [float(part.max()) * level for level in (0.1, 0.5)]
                parts.contour(
                    grid.x.numpy(), grid.y.numpy(), part.numpy(), levels=levels, colors=color(m)
                )
            shares = (density.sum((0, 1)) * grid.cell).tolist()
            parts.set_title("components: " + ", ".join(f"{share:.2f}" for share in shares))
