"""The pictures of the MAPA benchmark: costs, posteriors before and after training, samples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from benchmarks.mapa_methods import KDE, METHODS, Empirical, Learner, build
from benchmarks.mapa_report import values
from benchmarks.report import color
from pyro_recursive import MAPAGuide
from pyro_recursive.datasets import Curve
from pyro_recursive.mapa.table import Rows

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


def plot(results: dict[str, Any], draw: Draw, folder: Path) -> list[Path]:
    """Draw all there is something for, from results and the networks of the first draw."""
    import matplotlib

    matplotlib.use("Agg")
    draws = {name: found for name, found in results["draws"].items() if found}
    if not draws:
        return []
    hidden = results["settings"]["hidden"]
    data = {name: draw(name, seed=min(map(int, found))) for name, found in draws.items()}
    drawn = {
        "costs.png": _costs(draws),
        "trends.png": _trends(data, folder, hidden),
        "posteriors.png": _posteriors(data, folder, hidden),
        "samples.png": _samples(data, folder, hidden),
    }
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=90)
            written.append(folder / name)
    matplotlib.pyplot.close("all")
    return written


def _figure(rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    size = (3.1 * columns, 2.9 * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def _costs(draws: dict[str, Any]) -> Any:
    figure, axes = _figure(1, len(draws))
    for panel, (name, found) in zip(axes[0], draws.items(), strict=True):
        known = [m for m in METHODS if len(values(found, m, "kl"))]
        for place, title in enumerate(CURVES_OF_COST):
            line = sorted(_cost(found, m) for m in known if _is_of(m, title))
            line = [_cost(found, "VAE"), *line] if title == "IWAE" and "VAE" in known else line
            x, y = zip(*line, strict=True) if line else ((), ())
            panel.plot(x, y, "o-", color=color(place), label=title, markersize=4)
        others = [m for m in known if not any(_is_of(m, title) for title in CURVES_OF_COST)]
        if KDE in known:
            panel.axhline(_cost(found, KDE)[1], color="0.5", linestyle="--", label=KDE)
        for place, method in enumerate(m for m in others if m not in ("VAE", KDE)):
            mark = "sDv^<>P"[place % 7]
            panel.plot(*_cost(found, method), mark, color=color(place + 3), label=method)
        panel.set(title=name, xlabel="decoder passes per point", xscale="log", xlim=PASSES)
        if any(_cost(found, method)[1] > 0 for method in known):  # a log axis needs something
            panel.set_yscale("log")
    axes[0][0].set_ylabel("test KL, nats")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def _cost(found: dict[str, Any], method: str) -> tuple[float, float]:
    passes, kl = (values(found, method, key).mean().item() for key in ("passes", "kl"))
    return passes, kl


def _trends(data: dict[str, Curve], folder: Path, hidden: int) -> Any:
    """Draw index posteriors as pictures: test points and codes in the order of true latents."""
    shown = {name: _learned(folder, c, SHOWN, hidden) for name, c in data.items()}
    rows = [(data[name], learner) for name, learner in shown.items() if learner is not None]
    if not rows:
        return None
    figure, axes = _figure(len(rows), 3)
    for panels, (points, learner) in zip(axes, rows, strict=True):
        order = points.test_latents[:POINTS, 0].argsort()
        across = points.train_latents[:, 0].argsort()
        x, z = points.test[:POINTS][order], points.test_latents[:POINTS][order]
        for panel, (title, mass) in zip(panels, _masses(learner, points, x).items(), strict=True):
            picture = mass[:, across].sqrt()  # the square root, or wide posteriors are not seen
            picture = picture / picture.amax(1, keepdim=True)
            panel.imshow(picture.numpy(), aspect="auto", origin="lower", cmap="Greys", vmin=0)
            panel.set_title(f"{points.name}: {title}", fontsize=9)
            panel.set_xlabel("training points, by true latent", fontsize=8)
            panel.set_yticks([])
        ticks = torch.linspace(0, len(x) - 1, 5).long()
        panels[0].set_yticks(ticks, [f"{v:.1f}" for v in z[ticks, 0].tolist()])
        panels[0].set_ylabel("test points: true latent", fontsize=8)
    return figure


def _posteriors(data: dict[str, Curve], folder: Path, hidden: int) -> Any:
    """Draw the same posteriors over the data plane, for three points."""
    shown = {name: _learned(folder, c, SHOWN, hidden) for name, c in data.items()}
    rows = [(data[name], learner) for name, learner in shown.items() if learner is not None]
    if not rows:
        return None
    figure, axes = _figure(len(rows), 3, sharex="row", sharey="row")
    for panels, (points, learner) in zip(axes, rows, strict=True):
        order = points.test_latents[:, 0].argsort()
        x = points.test[order[[int(q * (len(order) - 1)) for q in QUANTILES]]]
        for panel, (title, mass) in zip(panels, _masses(learner, points, x).items(), strict=True):
            panel.plot(*points.train.T, ".", color="0.85", markersize=3)
            for place, (point, share) in enumerate(zip(x, mass, strict=True)):
                size = 60 * (share / share.max()).numpy()
                panel.scatter(*points.train.T, s=size, color=color(place), alpha=0.4, linewidths=0)
                panel.plot(*point, "x", color="black")
            panel.set_title(f"{points.name}: {title}", fontsize=9)
            panel.set_aspect("equal", adjustable="box")
    return figure


def _samples(data: dict[str, Curve], folder: Path, hidden: int) -> Any:
    """Draw samples of the learned models beside the data."""
    learners = {
        name: {m: _learned(folder, points, m, hidden) for m in SAMPLED}
        for name, points in data.items()
    }
    if not any(learner for found in learners.values() for learner in found.values()):
        return None
    figure, axes = _figure(len(data), 1 + len(SAMPLED), sharex="row", sharey="row")
    for panels, (name, points) in zip(axes, data.items(), strict=True):
        noise = torch.Generator().manual_seed(0)
        z, spread = (torch.randn(1000, d, generator=noise, dtype=torch.float32) for d in (1, 2))
        panels[0].plot(*points.test[:1000].T, ".", color="black", markersize=2)
        panels[0].set_title(f"{name}: data", fontsize=9)
        low, high = points.test.aminmax(dim=0)
        margin = 0.3 * (high - low)  # models that are not yet near the data go beyond
        (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
        panels[0].set(xlim=(left, right), ylim=(bottom, top))
        for panel, (method, learner) in zip(panels[1:], learners[name].items(), strict=True):
            panel.set_title(method, fontsize=9)
            if learner is not None:
                with torch.no_grad():
                    curve = learner.generator()(z)
                panel.plot(*(curve + points.scale * spread).T, ".", color="C0", markersize=2)
    return figure


def _learned(folder: Path, data: Curve, method: str, hidden: int) -> Learner | None:
    """Return a method as it was trained, if its networks were kept."""
    path = state_path(folder, data.name, method)
    if not path.exists():
        return None
    learner = build(METHODS[method], data, hidden, seed=0)
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


def _dense(rows: Rows, number: int) -> Tensor:
    mass = rows.log_q.new_zeros(len(rows.index), number)
    return mass.scatter(1, rows.index, rows.log_q.detach().exp())
