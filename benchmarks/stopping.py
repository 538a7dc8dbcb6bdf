"""Where `fit(steps="auto")` stops: ELBO there, and that of a long run at a falling rate.

Gaussian guides on four real posteriors, from Pathfinder's location with scale 0.1, by Adam at 0.05
with 8 draws a step; "whitened" ones in units of Pathfinder's covariance. The long run goes on from
there, its rate falls from 0.05 to 0, and it ends with the mean of its last half. "Plain" is a run
of as many steps as the rule took, at 0.05, and its last parameters. ELBOs are those of 20,000 draws
from the same random numbers. A family's optimum is the best ELBO of all its runs: the two guides of
full rank are one family, and a whitened diagonal one is another with each seed.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks.report import Results, finish, hardware, table, write_json
from benchmarks.run import base_parser, parse, stored
from benchmarks.tasks.posteriordb import NAMES, Posterior, load
from pyro_recursive import AmortizedGuide, fit
from pyro_recursive.evaluation import posterior_draws
from pyro_recursive.training import History
from pyro_recursive.training.stopping import BLOCK

POSTERIORS = (
    "eight_schools-eight_schools_noncentered",
    "kidiq-kidscore_interaction",
    "arK-arK",
    "low_dim_gauss_mix-low_dim_gauss_mix",
)
GUIDES: dict[str, dict[str, Any]] = {
    "diagonal": {"family": "diagonal", "init_loc_fn": "pathfinder"},
    "full": {"family": "full", "init_loc_fn": "pathfinder"},
    "whitened diagonal": {"family": "diagonal", "whiten": True},
    "whitened full": {"family": "full", "whiten": True},
}
NESTING = 2  # of the plates of all models


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result."""

    seeds: tuple[int, ...]
    max_steps: int
    long: int  # steps of the long run
    rate: float = 0.05
    draws_a_step: int = 8
    draws: int = 20_000


def main(arguments: list[str]) -> None:
    """Train every guide on every posterior with every seed; print a table, write JSON."""
    parser = base_parser("stopping", __doc__)
    parser.add_argument("--posteriors", nargs="+", default=list(POSTERIORS), choices=list(NAMES))
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=list(GUIDES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-steps", type=int, default=20_000)
    parser.add_argument("--long", type=int, default=6_000, help="steps of the long run")
    parser.add_argument("--engine", default="replay", help="of compiled steps")
    parser.add_argument("--resume", action="store_true", help="go on after an interrupt")
    options = parse(parser, arguments, seeds=[0], max_steps=100, long=100)
    torch.set_default_dtype(torch.float64)
    settings = Settings(tuple(options.seeds), options.max_steps, options.long)
    folder = Path(options.output)
    as_json = asdict(settings) | {"seeds": list(settings.seeds)}
    results = stored(folder, as_json, options.resume, "runs")
    jobs = [(p, g, s) for p in options.posteriors for g in options.guides for s in options.seeds]
    for name, guide, seed in tqdm(jobs, desc="runs"):
        found = results["runs"].setdefault(name, {}).setdefault(guide, {})
        if str(seed) not in found:
            compiled = {} if options.smoke else {"compile": options.engine}
            train = partial(_train, settings, seed, compile_cache=folder / "graphs", **compiled)
            found[str(seed)] = run(load(name), GUIDES[guide], settings, seed, train)
            write_json(folder / "results.json", results)
    results["hardware"] = hardware()
    finish(results, folder / "results.json", report(results))


def run(
    posterior: Posterior,
    options: dict[str, Any],
    settings: Settings,
    seed: int,
    train: Callable[..., History],
) -> dict[str, Any]:
    """Return steps and ELBOs of one guide, in nats."""
    guide = _guide(posterior, options, seed)
    history = train(posterior, guide, steps="auto", max_steps=settings.max_steps)
    found: dict[str, Any] = {"steps": history.steps[-1], "stopped": history.stopped}
    found["elbo"] = _elbo(posterior, guide, settings)
    blocks = -(-settings.long // BLOCK)
    decay = partial(LambdaLR, lr_lambda=lambda block: 1 - block / blocks)
    train(posterior, guide, steps=settings.long, scheduler=decay)
    found["long"] = _elbo(posterior, guide, settings)
    guide = _guide(posterior, options, seed)
    train(posterior, guide, steps=history.steps[-1], average=False)
    return {**found, "plain": _elbo(posterior, guide, settings)}


def _guide(posterior: Posterior, options: dict[str, Any], seed: int) -> AmortizedGuide:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AmortizedGuide(posterior.model, **options)
    guide.prepare()
    return guide


def _train(
    settings: Settings, seed: int, posterior: Posterior, guide: AmortizedGuide, **options: Any
) -> History:
    return fit(
        posterior.model,
        guide,
        (),
        loss=Trace_ELBO(settings.draws_a_step, max_plate_nesting=NESTING, vectorize_particles=True),
        optimizer=partial(torch.optim.Adam, lr=settings.rate),
        seed=seed,
        progress=False,
        **{"average": True, **options},
    )


def _elbo(posterior: Posterior, guide: AmortizedGuide, settings: Settings) -> float:
    pyro.set_rng_seed(0)
    draws = posterior_draws(posterior.model, guide, num_draws=settings.draws)
    return draws.log_weights.mean().item()


# The report.


def report(results: Results) -> str:
    """Return a row for each posterior and guide, with all seeds."""
    header = ["posterior", "guide", "ELBO", "short of the optimum", "plain", "steps", "excess"]
    rows = []
    for name, guides in results["runs"].items():
        for guide, runs in guides.items():
            optima = [_optimum(guides, guide, seed) for seed in runs]
            rows.append([name, guide, *_cells([*runs.values()], optima)])
    return table(header, rows)


def _optimum(guides: dict[str, dict[str, Any]], guide: str, seed: str) -> float:
    """Return the highest ELBO of a family; that of a whitened diagonal one depends on the seed."""
    if guide == "whitened diagonal":
        alike = [guides[guide][seed]]
    else:
        names = [g for g in guides if g.endswith("full")] if guide.endswith("full") else [guide]
        alike = [run for name in names for run in guides[name].values()]
    return max(max(run["elbo"], run["long"]) for run in alike)


def _cells(runs: list[dict[str, Any]], optima: list[float]) -> list[str]:
    pairs = [*zip(runs, optima, strict=True)]
    excess = [run["stopped"].partition("excess ")[2].partition(" nats")[0] for run in runs]
    return [
        ", ".join(f"{run['elbo']:.2f}" for run in runs),
        ", ".join(f"{optimum - run['elbo']:.3f}" for run, optimum in pairs),
        ", ".join(f"{optimum - run['plain']:.2f}" for run, optimum in pairs),
        ", ".join(str(run["steps"]) for run in runs),
        ", ".join(
            "cap: " * run["stopped"].startswith("cap") + e
            for run, e in zip(runs, excess, strict=True)
        ),
    ]
