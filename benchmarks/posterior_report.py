"""The table and the pictures of the posteriors benchmark."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import figure, spread, table
from benchmarks.tasks.posteriors import Draws, Problem

REFERENCE = "NUTS"


def report(found: dict[str, Any], problem: Problem) -> str:
    """Return the table of a model; over several seeds, means ± standard deviations."""
    header = ["guide", "ELBO", "KL(q||p)", "log p(x)", "± error", "ESS", "modes", "parts", "s"]
    rows = [_row(name, runs, problem) for name, runs in found["guides"].items()]
    nuts = found["nuts"]
    modes = f"{_covered(nuts['modes'], problem)} of {problem.modes}"
    rows.append([REFERENCE, "", "", "", "", "", modes, "", f"{nuts['seconds']:.0f}"])
    each = [str(_covered(shares, problem)) for shares in nuts["modes_by_chain"]]
    r_hat = ", ".join(f"{value:.2f}" for value in nuts["r_hat"])
    title = f"{found['title']}: log p(x) = {found['log_evidence']:.3f} by quadrature"
    ending = f"NUTS: modes in each chain {', '.join(each)}; split R-hat of what is drawn {r_hat}"
    return f"{title}\n{table(header, rows)}\n{ending}"


def _row(name: str, runs: list[dict[str, Any]], problem: Problem) -> list[str]:
    modes = sorted({_covered(run["modes"], problem) for run in runs})
    parts = sorted({run["components"] for run in runs})
    return [
        name,
        _over_seeds(runs, "elbo"),
        _over_seeds(runs, "kl"),
        _over_seeds(runs, "log_marginal"),
        f"{max(run['standard_error'] for run in runs):.3f}",
        f"{min(run['ess'] for run in runs):.0f}",
        f"{'-'.join(map(str, modes))} of {problem.modes}",
        "-".join(map(str, parts)),
        f"{sum(run['seconds'] for run in runs) / len(runs):.0f}",
    ]


def _over_seeds(runs: list[dict[str, Any]], key: str) -> str:
    return spread(torch.tensor([run[key] for run in runs]), digits=3)


def _covered(shares: list[float], problem: Problem) -> int:
    return sum(share >= 0.1 / problem.modes for share in shares)


def plot(problem: Problem, found: dict[str, Any], draws: dict[str, Draws], path: Path) -> None:
    """Draw the posterior, and over it the draws of NUTS and of each guide."""
    names, columns = [REFERENCE, *(name for name in draws if name != REFERENCE)], 4
    rows = -(-len(names) // columns)
    options = {"figsize": (13, 3.1 * rows), "sharex": True, "sharey": True}
    with figure(path, rows, columns, 80, **options) as (drawn, axes):
        for number, (panel, name) in enumerate(zip(axes.flat, names, strict=False)):
            _panel(panel, problem, problem.view(draws[name]), f"C{number}")
            modes = "" if problem.modes == 1 else f", modes {_modes(name, found, problem)}"
            kl = "" if name == REFERENCE else f": KL {found['guides'][name][0]['kl']:.2f}"
            panel.set_title(f"{name}{kl}{modes}", fontsize=10)
        for panel in axes.flat[len(names) :]:
            panel.set_visible(False)
        drawn.suptitle(f"{problem.title}: the posterior by quadrature (grey) and draws")


def _modes(name: str, found: dict[str, Any], problem: Problem) -> str:
    run = found["nuts"] if name == REFERENCE else found["guides"][name][0]
    return f"{_covered(run['modes'], problem)}/{problem.modes}"


def _panel(panel: Any, problem: Problem, draws: Tensor, color: str) -> None:
    density = (problem.reference - problem.reference.max()).exp()
    points = [
        torch.linspace(low, high, size)
        for (_, low, high), size in zip(problem.axes, density.shape, strict=True)
    ]
    if draws.shape[-1] == 1:
        _, low, high = problem.axes[0]
        mass = density / (density.sum() * (points[0][1] - points[0][0]))
        panel.fill_between(points[0], mass, color="0.75")
        panel.hist(
            draws[:, 0].numpy(), 120, (low, high), density=True, histtype="step", color=color
        )
        panel.set_xlabel(problem.axes[0][0])
        return
    levels = _levels(density)
    panel.contourf(*points, density.T, levels=[*levels, 2.0], colors=["0.9", "0.8", "0.65"])
    shown = draws[:: max(1, len(draws) // 1000)]
    panel.plot(*shown.T, ".", markersize=1.5, color=color, alpha=0.7)
    box = [_extent(density, points, axis, levels[0]) for axis in (0, 1)]
    panel.set(xlim=box[0], ylim=box[1], xlabel=problem.axes[0][0], ylabel=problem.axes[1][0])


def _levels(density: Tensor, masses: tuple[float, ...] = (0.99, 0.9, 0.5)) -> list[float]:
    """Return the heights of the regions of highest density that hold so much of the mass."""
    heights = density.flatten().sort(descending=True).values
    held = heights.cumsum(0) / heights.sum()
    return [heights[int((held < mass).sum())].item() for mass in masses]


def _extent(density: Tensor, points: list[Tensor], axis: int, level: float) -> tuple[float, ...]:
    inside = points[axis][(density > level).any(1 - axis)]
    margin = 0.25 * (inside[-1] - inside[0]).item()
    return inside[0].item() - margin, inside[-1].item() + margin
