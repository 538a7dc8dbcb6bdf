"""Real posteriors with reference draws: what approximations are away from them, and what they cost.

The 16 posteriors of `benchmarks.tasks.posteriordb`, from ``PYRO_RECURSIVE_DATA/posteriordb``, and
two with several modes, whose reference draws are by quadrature. Errors are those of
`benchmarks.tasks.reference.Scores`; "weighted" are those of draws weighted by their smoothed
importance weights. Gradients are those of log p at single points, and second derivatives at a point
count as D of them. Seconds are of the processor. A run that fails is a row that says why. AutoDAIS
and SteinVI are run by name only, on linear regressions, and need the extra `numpyro`.
"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.methods import posteriordb_numpyro as in_numpyro
from benchmarks.methods.posteriordb import (
    METHODS,
    Counted,
    Run,
    Sampled,
    Settings,
    Trained,
    counting,
)
from benchmarks.posteriordb_report import plot, plot_overview, report, tables
from benchmarks.report import Results, finish, write_json
from benchmarks.run import base_parser, parse, stored
from benchmarks.tasks.posteriordb import NAMES, load
from benchmarks.tasks.posteriors import PROBLEMS
from benchmarks.tasks.reference import Posterior
from pyro_recursive.evaluation import posterior_draws, psis

QUADRATURE = ("labels", "square")  # of benchmarks.tasks.posteriors
REFERENCE_DRAWS = 10_000
CHUNK = 1000  # draws of a guide at once
EVERY = METHODS | in_numpyro.METHODS
SMOKE = {"seeds": [0], "steps": 12}


def main(arguments: list[str]) -> None:
    """Run every method on every posterior with every seed; print tables, write JSON and plots."""
    every = [*NAMES, *QUADRATURE]
    parser = base_parser("posteriordb", __doc__)
    parser.add_argument("--posteriors", nargs="+", choices=every, help="default: all of them")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(EVERY))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000, help="of a guide that is trained")
    parser.add_argument("--compile", action="store_true", help="the gradients of NUTS")
    parser.add_argument("--timing", action="store_true", help="time steps, eager and compiled")
    parser.add_argument("--resume", action="store_true", help="go on after an interrupt")
    options = parse(parser, arguments, **SMOKE)
    options.posteriors = options.posteriors or (["square"] if options.smoke else every)
    if {*options.methods} & {*in_numpyro.METHODS}:
        in_numpyro.check_installed()
    torch.set_default_dtype(torch.float64)
    settings = Settings(options.steps, compiled=options.compile)
    if options.smoke:
        settings = Settings(options.steps, scored=200, warmup=20, kept=20)
    folder = Path(options.output)
    as_json = {name: value for name, value in asdict(settings).items() if name != "compiled"}
    results = stored(folder, as_json, options.resume, "runs")
    missing = list(_missing(options, results))
    for name, method, seed in tqdm(missing, desc="runs"):
        found = run(posterior(name), method, settings, seed)
        results["runs"].setdefault(name, {}).setdefault(method, {})[str(seed)] = found
        results.setdefault("floors", {})[name] = posterior(name).floor
        write_json(folder / "results.json", results)
    if options.timing:
        time_steps(options, settings, results)
    found = results["runs"]
    results["runs"] = {
        name: {method: found[name][method] for method in EVERY if method in found[name]}
        for name in every
        if name in found
    }
    pictures = {folder / "errors.png": plot, folder / "overview.png": plot_overview}
    for picture, draw in pictures.items():
        draw(results, picture)
    (folder / "tables.md").write_text(tables(results) + "\n")
    finish(results, folder / "results.json", report(results), pictures)


def _missing(options: Any, results: Results) -> Iterator[tuple[str, str, int]]:
    """Yield the runs without a result: all of a seed before the next one."""
    for seed in options.seeds:
        for name in options.posteriors:
            for method in options.methods:
                known = results["runs"].get(name, {}).get(method, {})
                applies = method in METHODS or in_numpyro.applies(posterior(name))
                if applies and str(seed) not in known:
                    yield name, method, seed


def time_steps(options: Any, settings: Settings, results: Results) -> None:
    """Add what training steps cost, by posterior and method."""
    for name in options.posteriors:
        for method in options.methods:
            known = results.setdefault("steps", {}).setdefault(name, {})
            way = EVERY[method]
            if isinstance(way, Trained) and method not in known:
                plain: Any = posterior(name).model  # counts in Python would keep steps eager
                given = Run(posterior(name), plain, settings)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    known[method] = way.costs(given, settings.steps)
                write_json(Path(options.output) / "results.json", results)


@cache
def posterior(name: str) -> Posterior:
    """Return a posterior with its reference draws."""
    if name not in QUADRATURE:
        return load(name)
    problem = PROBLEMS[name]()
    assert problem.draw is not None
    return Posterior(
        name,
        problem.model,
        problem.draw(REFERENCE_DRAWS),
        lambda values: values,
        problem.log_evidence,
        problem.modes,
        problem.mode_of,
    )


def run(posterior: Posterior, method: str, settings: Settings, seed: int) -> dict[str, Any]:
    """Return the scores and the cost of one approximation, or why it failed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = Counted(posterior.model)
    start = time.process_time()
    with warnings.catch_warnings(), counting(model):
        warnings.simplefilter("ignore")
        try:
            found = EVERY[method](Run(posterior, model, settings))
            numbers = {
                "gradients": model.gradients,
                "values": model.values,
                "seconds": time.process_time() - start,
            }
            return numbers | _scored(posterior, found, settings)
        except Exception as error:  # of whatever kind: it is the result of the run
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            return {"fails": reason, "seconds": time.process_time() - start}


def _scored(posterior: Posterior, found: Any, settings: Settings) -> dict[str, Any]:
    if isinstance(found, Sampled):
        about = {**found.about, "gradients": found.gradients, "compiled": settings.compiled}
        scores = _scores(posterior, found.draws, None)
        return {**about, "scores": scores, "modes": posterior.covered(found.draws)}
    options: Any = {"num_draws": settings.scored, "chunk_size": CHUNK}
    draws = posterior_draws(posterior.model, found, **options)
    values = {name: site.value for name, site in draws.sites.items()}
    weights = psis(draws.log_weights)
    return {
        "elbo": draws.log_weights.mean().item(),
        "pareto_k": weights.pareto_k.item(),
        "scores": _scores(posterior, values, None),
        "weighted": _scores(posterior, values, weights.log_weights),
        "components": len(getattr(found, "members", (0,))),
        "modes": posterior.covered(values),
    }


def _scores(posterior: Posterior, draws: dict[str, Tensor], log_weights: Tensor | None) -> Any:
    return asdict(posterior.scores(draws, log_weights))
