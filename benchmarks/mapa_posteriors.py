"""Posteriors of the index under two decoders of the same data: what MAPA takes for granted.

Two networks with different first weights give a row another posterior over the latents, at other
places and of another width. The index posterior p(i | x_n), over the training points whose codes
explain a row, is to be nearly the same for both, and near MAPA's proposal, which is known before
training.
"""

from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from benchmarks.methods.mapa import Diverged, Empirical, build, train
from benchmarks.report import color, figure, table
from benchmarks.tasks.curves import CurveData
from pyro_recursive.datasets import Curve

SHOWN = 1e-3  # the smallest probability of an index that is kept
ENTROPY_RANK = 0.9  # of the row that is shown: one with a wide posterior
PAIRS = [("first", "second"), ("first", "proposal"), ("second", "proposal")]
PAIRS += [("true decoder", "first"), ("true decoder", "proposal")]


def index_posteriors(data: Curve, method: Any, settings: Any) -> dict[str, Any]:
    """Train two networks with different first weights; compare their index posteriors.

    Returns means over training rows of the total variation (0 to 1) and of the KL divergence, in
    nats, and for one row the indices, their codes and their probabilities, under both networks,
    under the true decoder and under the proposal. Where training diverged, the entry ``diverged``
    alone says how.
    """
    learners: dict[str, Empirical] = {}
    for seed, name in enumerate(("first", "second")):
        learner = build(method, CurveData(data, settings.hidden), seed, len(data.train))
        assert isinstance(learner, Empirical)
        try:
            with pyro.validation_enabled(False):
                train(learner, seed, settings.epochs, settings.batch_size, settings.rate)
        except Diverged as error:
            return {"diverged": f"{name} network: {error}"}
        learners[name] = learner
    posteriors = {
        **{name: _log_posterior(data, each.points()) for name, each in learners.items()},
        "true decoder": _log_posterior(data, data.decoder(data.train_latents)),
        "proposal": _log_proposal(learners["first"]),
    }
    row = _shown(posteriors["true decoder"])
    probabilities = {name: found[row].exp() for name, found in posteriors.items()}
    order = data.train_latents[:, 0].argsort()  # along the curve
    kept = order[(torch.stack(list(probabilities.values())).amax(0) > SHOWN)[order]]
    return {
        "kl": {f"{a}, {b}": _divergence(posteriors[a], posteriors[b]) for a, b in PAIRS},
        "variation": {f"{a}, {b}": _variation(posteriors[a], posteriors[b]) for a, b in PAIRS},
        "row": row,
        "indices": kept.tolist(),
        "codes": {n: _rounded(each.codes()[kept, 0]) for n, each in learners.items()},
        "probabilities": {n: _rounded(found[kept]) for n, found in probabilities.items()},
    }


def _log_posterior(data: Curve, points: Tensor) -> Tensor:
    """Return log p(i | x_n) ``[N, N]``, in which code i is decoded to a point."""
    distance = torch.cdist(data.train.double(), points.detach().double()) / data.scale
    return (-0.5 * distance.square()).log_softmax(1)


def _log_proposal(learner: Empirical) -> Tensor:
    count = len(learner.data.train)
    rows = learner.guide.table.rows(torch.arange(count))
    found = torch.full((count, count), -torch.inf, dtype=torch.float64)
    return found.scatter(1, rows.index, rows.log_q.double())


def _shown(log_p: Tensor) -> int:
    """Return a row with a wide posterior."""
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(1)
    return int(entropy.argsort()[int(ENTROPY_RANK * len(entropy))])


def _divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Return KL(p || q), the mean over rows."""
    terms = torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0.0)
    return terms.sum(1).mean().item()


def _variation(log_p: Tensor, log_q: Tensor) -> float:
    """Return half the sum of absolute differences, the mean over rows."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(1).mean().item()


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def divergences(found: dict[str, Any]) -> str:
    """Return the differences between index posteriors, of each curve, or that it diverged."""
    pairs, rows = [f"{a}, {b}" for a, b in PAIRS], []
    for name, each in found.items():
        if "diverged" in each:
            rows.append([name, f"diverged, {each['diverged']}", *("" for _ in pairs[1:])])
            continue
        cells = (f"{each['variation'][pair]:.2f} ({each['kl'][pair]:.2g})" for pair in pairs)
        rows.append([name, *cells])
    title = "Index posteriors: total variation (and KL in nats), means over rows"
    return f"{title}\n{table(['data', *pairs], rows)}"


def plot_posteriors(found: dict[str, Any], curves: dict[str, Curve], path: Path) -> None:
    """Draw a row of each curve: its posterior over the codes of both decoders, and over indices."""
    with figure(path, len(found), 4, 90, figsize=(15, 2.8 * len(found))) as (_, axes):
        for panels, (name, each) in zip(axes, found.items(), strict=True):
            x, kept, p = curves[name].train.numpy(), each["indices"], each["probabilities"]
            panels[0].scatter(*x.T, s=2, color="0.8")
            panels[0].scatter(*x[kept].T, s=8, c=p["proposal"], cmap="viridis")
            panels[0].plot(*x[each["row"]], "r*", markersize=10)
            panels[0].set(title=f"{name}: a row, and q(i | row)", aspect="equal")
            for number, decoder in enumerate(each["codes"]):
                panel = panels[1 + number]
                panel.vlines(each["codes"][decoder], 0, p[decoder], color=color(number))
                panel.set(title=f"{decoder} decoder: p(i | row) at the codes", xlabel="code")
            for number, kind in enumerate(p):
                style = "k+" if kind == "proposal" else f"{color(number)}."
                panels[3].plot(p[kind], style, label=kind, markersize=4, alpha=0.7)
            panels[3].set(title="p(i | row) by index", xlabel="training points along the curve")
        axes[0][3].legend(fontsize=8)
