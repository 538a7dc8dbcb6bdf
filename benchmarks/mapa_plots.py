"""Figures of the MAPA benchmark: costs, posteriors before and after training, samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from benchmarks.mapa_report import values
from benchmarks.methods.curves import METHODS, learner_of
from benchmarks.methods.mapa import KDE, Empirical, Learner
from benchmarks.report import Results, color, figure
from benchmarks.tasks.curves import generator
from pyro_recursive import MAPAGuide
from pyro_recursive.datasets import Curve

CURVES_OF_COST = ("MAPA", "pooled", "IWAE")  # and a number of samples
SHOWN = "MAPA 5"  # whose posteriors are drawn
SAMPLED = ("VAE", "IWAE 20", "MAPA 5", "pooled .5", "exact sum")
QUANTILES = (0.25, 0.55, 0.85)  # of the true latent, for the three points of the data plane
POINTS = 300
PASSES = (0.1, 30.0)  # the axis: from less than the fewest to more than an IWAE's most
Draw = Callable[..., Curve]


def _is_of(method: str, title: str) -> bool:
    """Whether a method's name is a title and a number."""
    first, _, rest = method.partition(" ")
    return first == title and rest.replace(".", "").isdigit()


def state_path(folder: Path, dataset: str, method: str) -> Path:
    """Return where the networks of a method are kept."""
    return folder / "networks" / f"{dataset}-{method.replace(' ', '-')}.pt"


def plot(results: Results, draw: Draw, folder: Path) -> list[Path]:
    """Draw all there is something for, from results and the networks of the first draw."""
    draws = {name: found for name, found in results["draws"].items() if found}
    if not draws:
        return []
    hidden = results["settings"]["hidden"]
    data = {name: draw(name, seed=min(map(int, found))) for name, found in draws.items()}
    learned = {
        name: {method: _learned(folder, curve, method, hidden) for method in (SHOWN, *SAMPLED)}
        for name, curve in data.items()
    }
    pictures = [_costs(draws, folder / "costs.png")]
    if shown := [(data[name], found[SHOWN]) for name, found in learned.items() if found[SHOWN]]:
        pictures += [_trends(shown, folder / "trends.png")]
        pictures += [_posteriors(shown, folder / "posteriors.png")]
    if any(found[method] for found in learned.values() for method in SAMPLED):
        pictures.append(_samples(data, learned, folder / "samples.png"))
    return pictures


def _panels(path: Path, rows: int, columns: int, **options: Any) -> Any:
    return figure(path, rows, columns, 90, figsize=(3.1 * columns, 2.9 * rows), **options)


def _costs(draws: dict[str, Any], path: Path) -> Path:
    with _panels(path, 1, len(draws)) as (drawn, axes):
        for panel, (name, found) in zip(axes[0], draws.items(), strict=True):
            _draw_costs(panel, found)
            panel.set(title=name, xlabel="decoder passes per point", xscale="log", xlim=PASSES)
        axes[0][0].set_ylabel("test KL, nats")
        labels = axes[0][0].get_legend_handles_labels()
        drawn.legend(*labels, loc="outside right center", fontsize=8)
    return path


def _draw_costs(panel: Any, found: dict[str, Any]) -> None:
    known = [m for m in METHODS if len(values(found, m, "kl"))]
    for number, title in enumerate(CURVES_OF_COST):
        line = sorted(_cost(found, m) for m in known if _is_of(m, title))
        line = [_cost(found, "VAE"), *line] if title == "IWAE" and "VAE" in known else line
        x, y = zip(*line, strict=True) if line else ((), ())
        panel.plot(x, y, "o-", color=color(number), label=title, markersize=4)
    others = [m for m in known if not any(_is_of(m, title) for title in CURVES_OF_COST)]
    if KDE in known:
        panel.axhline(_cost(found, KDE)[1], color="0.5", linestyle="--", label=KDE)
    for number, method in enumerate(m for m in others if m not in ("VAE", KDE)):
        mark = "sDv^<>P"[number % 7]
        panel.plot(*_cost(found, method), mark, color=color(number + 3), label=method)
    if any(_cost(found, method)[1] > 0 for method in known):  # a log axis needs positive values
        panel.set_yscale("log")


def _cost(found: dict[str, Any], method: str) -> tuple[float, float]:
    passes, kl = (values(found, method, key).mean().item() for key in ("passes", "kl"))
    return passes, kl


def _trends(shown: list[tuple[Curve, Any]], path: Path) -> Path:
    """Draw index posteriors as pictures: test points and codes in the order of true latents."""
    with _panels(path, len(shown), 3) as (_, axes):
        for panels, (points, learner) in zip(axes, shown, strict=True):
            order = points.test_latents[:POINTS, 0].argsort()
            across = points.train_latents[:, 0].argsort()
            x, z = points.test[:POINTS][order], points.test_latents[:POINTS][order]
            masses = _masses(learner, points, x)
            for panel, (title, mass) in zip(panels, masses.items(), strict=True):
                picture = mass[:, across].sqrt()  # the square root shows wide posteriors, too
                picture = picture / picture.amax(1, keepdim=True)
                panel.imshow(picture.numpy(), aspect="auto", origin="lower", cmap="Greys", vmin=0)
                panel.set_title(f"{points.name}: {title}", fontsize=9)
                panel.set_xlabel("training points, by true latent", fontsize=8)
                panel.set_yticks([])
            ticks = torch.linspace(0, len(x) - 1, 5).long()
            panels[0].set_yticks(ticks, [f"{v:.1f}" for v in z[ticks, 0].tolist()])
            panels[0].set_ylabel("test points: true latent", fontsize=8)
    return path


def _posteriors(shown: list[tuple[Curve, Any]], path: Path) -> Path:
    """Draw the same posteriors over the data plane, for three points."""
    with _panels(path, len(shown), 3, sharex="row", sharey="row") as (_, axes):
        for panels, (points, learner) in zip(axes, shown, strict=True):
            order = points.test_latents[:, 0].argsort()
            x = points.test[order[[int(q * (len(order) - 1)) for q in QUANTILES]]]
            masses = _masses(learner, points, x)
            for panel, (title, mass) in zip(panels, masses.items(), strict=True):
                panel.plot(*points.train.T, ".", color="0.85", markersize=3)
                for number, (point, share) in enumerate(zip(x, mass, strict=True)):
                    style = {"color": color(number), "alpha": 0.4, "linewidths": 0}
                    panel.scatter(*points.train.T, s=60 * (share / share.max()).numpy(), **style)
                    panel.plot(*point, "x", color="black")
                panel.set_title(f"{points.name}: {title}", fontsize=9)
                panel.set_aspect("equal", adjustable="box")
    return path


def _samples(data: dict[str, Curve], learned: dict[str, Any], path: Path) -> Path:
    """Draw samples of the learned models beside the data."""
    options = {"sharex": "row", "sharey": "row"}
    with _panels(path, len(data), 1 + len(SAMPLED), **options) as (_, axes):
        for panels, (name, points) in zip(axes, data.items(), strict=True):
            noise = torch.Generator().manual_seed(0)
            z, error = (torch.randn(1000, d, generator=noise, dtype=torch.float32) for d in (1, 2))
            panels[0].plot(*points.test[:1000].T, ".", color="black", markersize=2)
            panels[0].set_title(f"{name}: data", fontsize=9)
            low, high = points.test.aminmax(dim=0)
            margin = 0.3 * (high - low)  # models that are not yet near the data go beyond
            (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
            panels[0].set(xlim=(left, right), ylim=(bottom, top))
            for panel, method in zip(panels[1:], SAMPLED, strict=True):
                panel.set_title(method, fontsize=9)
                if learner := learned[name][method]:
                    with torch.no_grad():
                        curve = generator(learner)(z)
                    panel.plot(*(curve + points.scale * error).T, ".", color="C0", markersize=2)
    return path


def _learned(folder: Path, data: Curve, method: str, hidden: int) -> Learner | None:
    """Return a method as it was trained, if its networks were kept."""
    path = state_path(folder, data.name, method)
    if not path.exists():
        return None
    learner = learner_of(method, data, hidden, seed=0)
    for part, state in torch.load(path, weights_only=True).items():
        getattr(learner, part).load_state_dict(state)
    return learner


def _masses(learner: Learner, data: Curve, x: Tensor) -> dict[str, Tensor]:
    """Return posteriors over the training points, ``[rows, N]``: two of MAPA, and the true one.

    The table has all codes, so that what the guide says after training is the exact posterior of
    the index under what was learned.
    """
    assert isinstance(learner, Empirical)
    pyro.clear_param_store()  # of other data
    learner.start(len(data.train))
    table = learner.guide.table
    guide = MAPAGuide(learner.model, learner.guide.codes, data.train, table=table, name="shown")
    points = data.decoder(data.train_latents)
    true = -0.5 * (torch.cdist(x.double(), points.double()) / data.scale).square()
    return {
        "kernel, before training": _dense(table.for_data(x), len(data.train)),
        "decoder, after training": _dense(guide.explain(x), len(data.train)),
        "true model": true.softmax(1).to(x.dtype),
    }


def _dense(rows: Any, number: int) -> Tensor:
    mass = rows.log_q.new_zeros(len(rows.index), number)
    return mass.scatter(1, rows.index, rows.log_q.detach().exp())
