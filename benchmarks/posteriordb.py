"""Real posteriors with reference draws: what a guide's draws are away from them.

The 16 posteriors of `benchmarks.tasks.posteriordb`, from ``PYRO_RECURSIVE_DATA/posteriordb``.
Errors are the largest over all parameters, of means in units of the reference standard deviation,
and of the logarithms of standard deviations; "weighted" are those of draws resampled by their
smoothed importance weights. Gradients are those of log p at single points.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from tqdm import tqdm

from benchmarks.report import Results, finish, hardware, table, write_json
from benchmarks.run import base_parser, parse, stored
from benchmarks.tasks.posteriordb import NAMES, Posterior, load
from pyro_recursive import pathfinder
from pyro_recursive.evaluation import posterior_draws, psis


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result."""

    seeds: tuple[int, ...]
    paths: int
    draws: int = 10_000


def main(arguments: list[str]) -> None:
    """Approximate every posterior with every seed; print a table, write JSON."""
    parser = base_parser("posteriordb", __doc__)
    parser.add_argument("--posteriors", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--paths", type=int, default=8)
    parser.add_argument("--resume", action="store_true", help="go on after an interrupt")
    options = parse(parser, arguments, seeds=[0])
    torch.set_default_dtype(torch.float64)
    settings = Settings(tuple(options.seeds), options.paths)
    folder = Path(options.output)
    as_json = asdict(settings) | {"seeds": list(settings.seeds)}
    results = stored(folder, as_json, options.resume, "runs")
    for name, seed in tqdm([(n, s) for n in options.posteriors for s in options.seeds]):
        found = results["runs"].setdefault(name, {})
        if str(seed) not in found:
            found[str(seed)] = run(load(name), settings, seed)
            write_json(folder / "results.json", results)
    results["hardware"] = hardware()
    finish(results, folder / "results.json", report(results))


def run(posterior: Posterior, settings: Settings, seed: int) -> dict[str, Any]:
    """Return errors, k-hat and cost of one approximation."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    guide = pathfinder(posterior.model, paths=settings.paths)
    seconds, found = time.perf_counter() - start, guide.report
    assert found is not None
    numbers = {**asdict(found), "components": len(found.weights), "seconds": seconds}
    draws = posterior_draws(posterior.model, guide, num_draws=settings.draws)
    smoothed = psis(draws.log_weights)
    index = torch.multinomial(smoothed.log_weights.exp(), settings.draws, replacement=True)
    values = {name: site.value for name, site in draws.sites.items()}
    return {
        **numbers,
        "pareto_k": smoothed.pareto_k.item(),
        "errors": posterior.errors(values),
        "weighted_errors": posterior.errors({n: value[index] for n, value in values.items()}),
    }


# The report.


def report(results: Results) -> str:
    """Return a row for each posterior, with the worst of its seeds."""
    header = ["posterior", "ELBO", "k-hat", "error", "weighted", "parts", "gradients", "values"]
    rows = [_row(name, [*runs.values()]) for name, runs in results["runs"].items()]
    return table([*header, "s"], rows)


def _row(name: str, runs: list[dict[str, Any]]) -> list[str]:
    def worst(key: str) -> float:
        return max(run[key] for run in runs)

    def errors(key: str) -> str:
        return "/".join(f"{max(run[key][i] for run in runs):.2f}" for i in range(2))

    return [
        name,
        f"{min(run['elbo'] for run in runs):.2f}",
        f"{worst('pareto_k'):.2f}",
        errors("errors"),
        errors("weighted_errors"),
        f"{worst('components'):.0f}",
        f"{worst('num_gradients'):.0f}",
        f"{worst('num_values'):.0f}",
        f"{worst('seconds'):.1f}",
    ]
