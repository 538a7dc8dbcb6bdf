"""Where guides start, and in which coordinates they train: this package's guides beside Pyro's.

Seven classical models with wide, sparse or constrained priors and no local latents to amortise.
Every guide takes the same number of steps of one Adam with the same learning rate (flows a
smaller one), one draw a step and component, from its default start. The ELBO of what it ended with
is compared with that of the autoguide of Pyro's that has the same family. A run whose ELBO is not
finite, or that raised, counts as minus infinity.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, autoguide
from tqdm import tqdm

from benchmarks.report import Results, finish, table, write_json
from benchmarks.run import base_parser, parse, stored
from benchmarks.tasks.classical import MODELS
from pyro_recursive import (
    AmortizedGuide,
    FlowGuide,
    MixtureGuide,
    RecursiveMixture_ELBO,
    RecursiveMixtureGuide,
    Schedule,
    Stratified_ELBO,
)
from pyro_recursive.guides.gaussian_families import LowRank

Model = Callable[[], None]
NESTING = 2  # of the plates of all models
RATE, RATE_OF_FLOWS = 0.03, 0.005  # of Adam


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result."""

    seeds: tuple[int, ...]
    steps: int
    draws: int = 2000  # for the ELBO at the end


@dataclass(frozen=True)
class Method:
    """How a guide is made, the autoguide that it is compared with, and how it is trained."""

    guide: Callable[[Model, int], Any]
    beside: str | None = None
    loss: Callable[[], ELBO] = Trace_ELBO
    rate: float = RATE


def _of_pyro(kind: str, rate: float = RATE) -> Method:
    return Method(lambda model, steps: getattr(autoguide, kind)(model), rate=rate)


def _flow(kind: str) -> Method:
    return Method(lambda model, steps: FlowGuide(model, kind), "AutoIAFNormal", rate=RATE_OF_FLOWS)


def _low_rank(model: Model, steps: int) -> AmortizedGuide:
    """Return a guide of the rank that Pyro's autoguide has by default."""
    probe = AmortizedGuide(model)
    probe.prepare()
    return AmortizedGuide(model, family=LowRank(round(probe.groups[0].size ** 0.5)))


def _recursive(model: Model, steps: int) -> RecursiveMixtureGuide:
    part = steps // 6
    schedule = Schedule(first=steps - 3 * part, propose=part, refine=part, joint=part)
    return RecursiveMixtureGuide(model, 2, schedule=schedule)


METHODS: dict[str, Method] = {
    "AutoNormal": _of_pyro("AutoNormal"),
    "AutoDiagonalNormal": _of_pyro("AutoDiagonalNormal"),
    "AutoMultivariateNormal": _of_pyro("AutoMultivariateNormal"),
    "AutoLowRankMultivariateNormal": _of_pyro("AutoLowRankMultivariateNormal"),
    "AutoIAFNormal": _of_pyro("AutoIAFNormal", rate=RATE_OF_FLOWS),
    "diagonal": Method(lambda model, steps: AmortizedGuide(model), "AutoDiagonalNormal"),
    "full": Method(
        lambda model, steps: AmortizedGuide(model, family="full"), "AutoMultivariateNormal"
    ),
    "low rank": Method(_low_rank, "AutoLowRankMultivariateNormal"),
    "IAF": _flow("iaf"),
    "coupling flow": _flow("coupling"),
    "mixture of 3": Method(
        lambda model, steps: MixtureGuide(model, 3),
        "AutoDiagonalNormal",
        lambda: Stratified_ELBO(1),
    ),
    "whitened diagonal": Method(
        lambda model, steps: AmortizedGuide(model, whiten=True), "AutoDiagonalNormal"
    ),
    "whitened full": Method(
        lambda model, steps: AmortizedGuide(model, family="full", whiten=True),
        "AutoMultivariateNormal",
    ),
    "whitened coupling flow": Method(
        lambda model, steps: FlowGuide(model, whiten=True), "AutoIAFNormal", rate=RATE_OF_FLOWS
    ),
    "recursive mixture": Method(
        _recursive, "AutoDiagonalNormal", lambda: RecursiveMixture_ELBO(1, update="guide")
    ),
}


def main(arguments: list[str]) -> None:
    """Train every guide on every model with every seed; print tables, write JSON."""
    parser = base_parser("starts", __doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--resume", action="store_true", help="go on after an interrupt")
    options = parse(parser, arguments, seeds=[0], steps=12)
    settings = Settings(tuple(options.seeds), options.steps)
    folder = Path(options.output)
    as_json = asdict(settings) | {"seeds": list(settings.seeds)}
    results = stored(folder, as_json, options.resume, "elbo")
    runs = [(m, name, s) for m in options.models for name in options.methods for s in options.seeds]
    for of_model, name, seed in tqdm(runs, desc="runs"):
        found = results["elbo"].setdefault(of_model, {}).setdefault(name, {})
        if str(seed) not in found:
            found[str(seed)] = elbo_after(MODELS[of_model], METHODS[name], settings, seed)
            write_json(folder / "results.json", results)
    finish(results, folder / "results.json", report(results))


def elbo_after(model: Model, method: Method, settings: Settings, seed: int) -> float | None:
    """Train a guide, and return its ELBO in nats; None where that is not finite."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    try:
        guide = method.guide(model, settings.steps)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": method.rate}), method.loss())
        for _ in range(settings.steps):
            svi.step()
        loss = Trace_ELBO(settings.draws, max_plate_nesting=NESTING, vectorize_particles=True)
        with torch.no_grad():
            elbo = -loss.loss(model, guide)
    except ValueError:  # Pyro's checks of parameters that are NaN
        return None
    return elbo if math.isfinite(elbo) else None


# The report.


def report(results: Results) -> str:
    """Return the ELBOs, and how far each guide is above the autoguide of the same family."""
    models = results["elbo"]
    names = [name for name in METHODS if any(name in of_model for of_model in models.values())]
    values = [[name, *(_cell(models[m].get(name, {})) for m in models)] for name in names]
    above = [
        [f"{name} - {METHODS[name].beside}", *(_difference(models[m], name) for m in models)]
        for name in names
        if METHODS[name].beside in names
    ]
    header = ["ELBO, mean over seeds (lowest)", *models]
    return f"{table(header, values)}\n\n{table(['difference of the means', *models], above)}"


def _mean(runs: dict[str, float | None]) -> float:
    found = [-math.inf if value is None else value for value in runs.values()]
    return sum(found) / len(found) if found else math.nan


def _cell(runs: dict[str, float | None]) -> str:
    lowest = min((-math.inf if value is None else value for value in runs.values()), default=0.0)
    return f"{_number(_mean(runs))} ({_number(lowest)})"


def _difference(of_model: dict[str, Any], name: str) -> str:
    mine, theirs = _mean(of_model[name]), _mean(of_model[str(METHODS[name].beside)])
    return "both failed" if mine == theirs == -math.inf else _number(mine - theirs, "+")


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3g}" if abs(value) >= 1e4 else f"{value:{sign}.2f}"
