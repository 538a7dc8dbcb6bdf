"""Signal-to-noise ratio of gradients on a linear Gaussian model, near and far from its optimum.

``p(z) = N(mu, I), p(x | z) = N(z, I), q(z | x) = N(A x + b, 2/3 I)`` with D = 20, whose optimum is
known; all parameters are moved off it by N(0, 0.01^2) (near) or N(0, 0.5^2) (far). The set-up of
`Tighter Variational Bounds are Not Necessarily Better` (Rainforth et al., arXiv 1802.04537), with
fewer data. Theory, near the optimum: the model's ratio grows as sqrt(M K), the pathwise guide's as
sqrt(M / K), and that of DReG grows with K.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.stats import linregress
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import Results, color, figure, finish, hardware, table
from benchmarks.run import base_parser, parse
from pyro_recursive import MIWAE_ELBO
from pyro_recursive.bounds.estimators import EstimatorName
from pyro_recursive.evaluation.snr import signal_to_noise

DIM, POINTS = 20, 16
ROWS_PER_PASS = 200_000  # copies times samples times data
PARTICLES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
ASYMPTOTIC = 64  # the rising laws are for large K: their slopes are fitted from here
ESTIMATES = (1, 2, 4, 8, 16, 32)
SIZES = {"K": PARTICLES, "M": ESTIMATES}
PARTICLES_OF_ESTIMATES = 8
# By label: the estimator, the parameter, and the slope in K that theory gives.
CURVES: dict[str, tuple[EstimatorName, str, float | None]] = {
    "model": ("pathwise", "mu", 0.5),
    "guide, pathwise": ("pathwise", "b", -0.5),
    "guide, dreg": ("dreg", "b", None),
    "guide, stl (biased)": ("stl", "b", None),
}


def main(arguments: list[str]) -> None:
    """Measure all curves, print their slopes; write JSON and a plot."""
    parser = base_parser("snr", __doc__)
    parser.add_argument("--draws", type=int, default=1000)
    options = parse(parser, arguments, draws=20)
    pyro.set_rng_seed(0)
    results: Results = {"settings": vars(options), "hardware": hardware()}
    for distance, perturbation in (("near", 0.01), ("far", 0.5)):
        results[distance] = measure(perturbation, options.draws)
    picture = Path(options.output) / "snr.png"
    plot(results, picture)
    finish(results, picture.with_suffix(".json"), report(results), [picture])


def measure(perturbation: float, draws: int) -> dict[str, dict[str, list[float]]]:
    """Return each curve's ratios, against K at M = 1 and against M at a fixed K."""
    problem = Problem(perturbation)
    curves: dict[str, dict[str, list[float]]] = {name: {"K": [], "M": []} for name in CURVES}
    axes = [("K", 1, k) for k in PARTICLES]
    axes += [("M", m, PARTICLES_OF_ESTIMATES) for m in ESTIMATES]
    for axis, estimates, particles in tqdm(axes, desc=f"perturbation {perturbation}"):
        for estimator in dict.fromkeys(estimator for estimator, _, _ in CURVES.values()):
            loss = MIWAE_ELBO(estimates, particles, estimator=estimator, max_plate_nesting=2)
            gradients = problem.gradients(loss, draws)
            for name, (wanted, parameter, _) in CURVES.items():
                if wanted == estimator:
                    found = signal_to_noise(gradients[parameter])
                    curves[name][axis].append(found.ratio.item())
    return curves


class Problem:
    """The linear Gaussian model with its parameters moved off the optimum.

    A plate of copies, each with parameters of its own at the same place, gives as many independent
    draws of the gradient in one pass.
    """

    def __init__(self, perturbation: float) -> None:
        truth = torch.randn(DIM)
        self.x = truth + math.sqrt(2) * torch.randn(POINTS, DIM)
        mean = self.x.mean(0)
        self.mu = mean + perturbation * torch.randn(DIM)
        slope = torch.eye(DIM) / 2 + perturbation * torch.randn(DIM, DIM)
        self.b = mean / 2 + perturbation * torch.randn(DIM)
        self.projected = self.x @ slope.T

    def model(self, copies: int) -> None:
        mu = pyro.param("mu", lambda: self.mu.repeat(copies, 1, 1))
        with pyro.plate("copies", copies, dim=-2), pyro.plate("data", POINTS, dim=-1):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            x = dist.Normal(z, 1.0).to_event(1)
            pyro.sample("x", x, obs=self.x.expand(copies, POINTS, DIM))

    def guide(self, copies: int) -> None:
        b = pyro.param("b", lambda: self.b.repeat(copies, 1, 1))
        with pyro.plate("copies", copies, dim=-2), pyro.plate("data", POINTS, dim=-1):
            pyro.sample("z", dist.Normal(self.projected + b, math.sqrt(2 / 3)).to_event(1))

    def gradients(self, loss: MIWAE_ELBO, draws: int) -> dict[str, Tensor]:
        """Return independent draws of the gradient of each parameter, ``[draws, D]``."""
        rows: dict[str, list[Tensor]] = {"mu": [], "b": []}
        samples = loss.num_estimates * loss.num_particles
        copies = max(1, min(draws, ROWS_PER_PASS // (samples * POINTS)))
        for _ in range(-(-draws // copies)):
            pyro.clear_param_store()
            loss.loss_and_grads(self.model, self.guide, copies)
            for name, kept in rows.items():
                gradient = pyro.param(name).unconstrained().grad
                assert gradient is not None
                kept.append(gradient[:, 0])
        return {name: torch.cat(kept)[:draws] for name, kept in rows.items()}


def measurable(ratios: list[float], draws: int) -> list[float]:
    """Replace what the noise of the mean of so many draws hides by NaN: two standard errors."""
    floor = math.sqrt(2 * math.sqrt(2 / DIM) / draws)
    return [ratio if ratio > floor else math.nan for ratio in ratios]


def slope(axis: str, ratios: list[float]) -> float:
    """Return the least-squares slope in log-log coordinates: of a rising law for large K."""
    pairs = [(s, r) for s, r in zip(SIZES[axis], ratios, strict=True) if not math.isnan(r)]
    rising = axis == "K" and len(pairs) > 1 and pairs[-1][1] > pairs[0][1]
    kept = [pair for pair in pairs if pair[0] >= ASYMPTOTIC or not rising]
    return linregress(*np.log(kept).T).slope if len(kept) > 1 else math.nan


def report(results: Results) -> str:
    """Return the slopes as a table."""
    header = ["gradient", "near: slope in K", "theory", "near: slope in M", "theory"]
    header += ["far: slope in K", "far: slope in M"]
    rows, draws = [], results["settings"]["draws"]
    for name, (_, _, theory) in CURVES.items():
        near, far = (
            {axis: measurable(r, draws) for axis, r in results[distance][name].items()}
            for distance in ("near", "far")
        )
        expected = "> 0" if theory is None else f"{theory:+.1f}"
        slopes = [f"{slope(axis, found[axis]):+.2f}" for found in (near, far) for axis in SIZES]
        rows.append([name, slopes[0], expected, slopes[1], "+0.5", *slopes[2:]])
    return table(header, rows)


def plot(results: Results, path: Path) -> None:
    """Draw the ratios against K and M, with the slopes of theory."""
    with figure(path, 1, 3, 120, figsize=(15, 4.5)) as (drawn, axes):
        panels = [("near", "K"), ("near", "M"), ("far", "K")]
        for panel, (distance, axis) in zip(axes[0], panels, strict=True):
            _draw_curves(panel, results, distance, axis)
        drawn.suptitle("Gradient signal-to-noise, linear Gaussian model (dotted: theory)")


def _draw_curves(panel: Any, results: Results, distance: str, axis: str) -> None:
    sizes = SIZES[axis]
    for number, name in enumerate(CURVES):
        ratios = measurable(results[distance][name][axis], results["settings"]["draws"])
        label = f"{name}: slope {slope(axis, ratios):+.2f}"
        panel.loglog(sizes, ratios, "o-", color=color(number), label=label)
        theory = 0.5 if axis == "M" else CURVES[name][2]
        known = [pair for pair in zip(sizes, ratios, strict=True) if not math.isnan(pair[1])]
        if distance == "near" and theory is not None and known:
            line = [known[-1][1] * (size / known[-1][0]) ** theory for size in sizes]
            panel.loglog(sizes, line, ":", color=color(number), linewidth=1)
    held = f"K = {PARTICLES_OF_ESTIMATES}" if axis == "M" else "M = 1"
    where = "near" if distance == "near" else "far from"
    panel.set(xlabel=axis, ylabel="signal-to-noise ratio", title=f"{where} the optimum, {held}")
    panel.legend(fontsize=8)
