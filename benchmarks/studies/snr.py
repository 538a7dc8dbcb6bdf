"""Signal-to-noise ratio of gradients of a VAE: before, during and after its training.

A VAE is trained by Trace_ELBO with 64 samples; the gradients of MIWAE(M, K) are measured on one
minibatch of test images with its first networks, after a tenth of training, and after all of it.
Theory (Rainforth et al., arXiv 1802.04537), for large K: the model's ratio grows as sqrt(M K), that
of the pathwise guide as sqrt(M / K).
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bounds import BASELINE, LOSSES, method
from benchmarks.experiment import kept_scores
from benchmarks.report import Results, color, figure, table
from benchmarks.run import Method, Methods, Settings, Task
from benchmarks.studies.study import Study
from benchmarks.tasks.images import VAE
from pyro_recursive import MIWAE_ELBO
from pyro_recursive.bounds.estimators import EstimatorName
from pyro_recursive.evaluation.snr import gradient_snr, log_slope

MOMENTS = {"before": 0.0, "during": 0.1, "after": 1.0}  # the part of training
ESTIMATORS: tuple[EstimatorName, ...] = ("pathwise", "dreg", "stl", "rws", "rws-dreg")
PARTICLES, ESTIMATES = (1, 4, 16, 64, 256, 1024), (1, 4, 16, 64)
PARTICLES_OF_ESTIMATES = 16
ROWS = 20  # of the minibatch
CELLS = [(1, k) for k in PARTICLES] + [(m, PARTICLES_OF_ESTIMATES) for m in ESTIMATES[1:]]


def _at(vae: VAE, task: Task, settings: Settings, share: float) -> Method:
    return replace(method(vae, task, settings, LOSSES[BASELINE]), share=share)


METHODS: Methods = {moment: partial(_at, share=share) for moment, share in MOMENTS.items()}


def evaluate(trained: Method, task: Task, settings: Settings) -> dict[str, Any]:
    """Return ratio and error of guide and model for each estimator, M and K.

    ``eval_samples // 50`` draws of each gradient; what is measured is kept in a file.
    """
    draws = max(10, settings.eval_samples // 50)
    kept, keep = kept_scores(trained, f"{draws} draws", {})
    for estimator in ESTIMATORS:
        for m, k in CELLS:
            key = f"{estimator} {m} {k}"
            if key in kept:
                continue
            loss = MIWAE_ELBO(m, k, estimator=estimator)
            model, guide = trained.vae.model, trained.guide
            found = gradient_snr(model, guide, loss, task.test[:ROWS], num_draws=draws, seed=0)
            kept[key] = {
                group: [found[group].ratio.item(), found[group].error.item()]
                for group in ("guide", "model")
            }
            keep()
    return {"draws": draws, "snr": kept}


def line(run: dict[str, Any], group: str, estimator: str, axis: str) -> tuple[Tensor, ...]:
    """Return sizes, ratios and errors ``[n]`` along K at M = 1, or along M at a fixed K."""
    if axis == "K":
        cells = {k: f"{estimator} 1 {k}" for k in PARTICLES}
    else:
        cells = {m: f"{estimator} {m} {PARTICLES_OF_ESTIMATES}" for m in ESTIMATES}
    found = [[size, *run["snr"][key][group]] for size, key in cells.items() if key in run["snr"]]
    return tuple(torch.tensor(found, dtype=torch.float64).T)


def slope(run: dict[str, Any], group: str, estimator: str, axis: str) -> str:
    """Return the exponent of the law ± its standard error, of ratios that are told from 0."""
    sizes, ratios, errors = line(run, group, estimator, axis)
    value, error = log_slope(sizes, ratios.where(ratios > 3 * errors, torch.nan), errors)
    return "" if math.isnan(value) else f"{value:+.2f} ± {error:.2f}"


def report(results: Results) -> str:
    """Return slopes in K and M for each moment, estimator and program, of the first seed."""
    rows = []
    for moment, runs in results["runs"].items():
        run = next(iter(runs.values()))
        for estimator in ESTIMATORS:
            sizes, found, _ = line(run, "guide", estimator, "K")
            ratios = dict(zip(sizes.tolist(), found.tolist(), strict=True))
            slopes = [slope(run, group, estimator, a) for group in ("guide", "model") for a in "KM"]
            few, many = (f"{ratios[k]:.3g}" for k in (4.0, 1024.0))
            rows.append([moment, estimator, *slopes, few, many])
    header = ["training", "estimator", "guide: slope in K", "guide: in M", "model: slope in K"]
    header += ["model: in M", "guide: ratio at K = 4", "at K = 1024"]
    return table(header, rows)


def plot(results: Results, path: Path) -> None:
    """Draw the ratios of guide and model over K for each moment of training."""
    moments = list(results["runs"]) or list(MOMENTS)
    with figure(path, 2, len(moments), figsize=(5 * len(moments), 8)) as (_, axes):
        for column, moment in zip(axes.T, results["runs"], strict=False):
            run = next(iter(results["runs"][moment].values()))
            for panel, group in zip(column, ("guide", "model"), strict=True):
                for number, estimator in enumerate(ESTIMATORS):
                    sizes, ratios, errors = line(run, group, estimator, "K")
                    seen = ratios.where(ratios > 3 * errors, torch.nan)
                    panel.errorbar(
                        sizes, seen, errors, fmt="o-", color=color(number), label=estimator
                    )
                panel.set(xscale="log", yscale="log", xlabel="K", title=f"{group}, {moment}")
            column[0].legend(fontsize=7)
        axes[0][0].set_ylabel("signal-to-noise ratio")


STUDY = Study(METHODS, evaluate, report, plot, datasets=("mnist",), networks=("200-50",))
