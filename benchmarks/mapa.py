"""MAPA on five curves in the plane, beside the VAE, the IWAE and what MAPA is to come near.

The protocol is ours and frozen. The paper's (arXiv 2403.08941) is unknown but for its outline: the
sizes of networks and data, restarts, learning rates and epochs are not those of its figures.

- 500 points to train on, 500 for validation, 5,000 to test, and noise of a known scale. A draw is a
  data set of its own seed. All methods have the same decoder, 1-50-50-50-2, and encoders of the
  same hidden layers, the same initial decoders, minibatches of 100 and steps of Adam. Of the
  restarts of a draw the one with the best log-likelihood of the validation points is kept.
- The score is the test KL, the mean over test points of log p*(x) - log p(x), both by quadrature.
  MAPA has its recovered prior, the quantile map of its codes (the copula); "KL of codes" is that
  of the mixture over the training codes, without recovery.
- "MAPA S" sums a row's nearest code and draws S of the others, independently: top=1, samples=S. The
  paper's S counts samples and may mean something else. "MAPA true 5" draws all from the index
  posterior of the true decoder at the true latents; "uniform 5" from all codes with equal
  probability.
- "pooled S" shares draws without replacement among the rows of a minibatch: one code a row summed
  and S drawn, or, for a fraction S, none summed. With 500 points, S of 4 or more is the exact sum.
- All of MAPA starts as an autoencoder, for a tenth of the epochs: from a constant decoder, a sum
  over codes is slow to move. Tables keep 128 neighbours, but for the exact sum.
- Decoder passes count different codes for each point of a minibatch; an IWAE's are its samples.
  "gap" is from the training bound up to the log-likelihood of the same parameters, on the training
  points; for MAPA that under its codes. Seconds are of the fastest restart,
  by the clock and, on a machine that others use as well, of processor time.
- "AE" is the autoencoder that MAPA starts as; its log p(x) is that of MAPA, under the recovered
  prior of its codes.
- Where "MAPA 5" is among the methods, the index posteriors under two of its networks with different
  first weights are compared, on the first draw of each curve. (The exact sum is the same for any
  permutation of the codes, and does not say which point has which.)
"""

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.mapa_posteriors import divergences, index_posteriors, plot_posteriors
from benchmarks.methods.mapa import (
    AUTOENCODER,
    Diverged,
    Learner,
    Method,
    build,
    independent,
    pooled,
    train,
)
from benchmarks.report import (
    BASELINE,
    Results,
    color,
    figure,
    finish,
    hardware,
    spread,
    table,
    with_error,
    write_json,
)
from benchmarks.run import base_parser, parse, stored
from benchmarks.tasks.curves import (
    CurveData,
    density_estimate,
    score,
    true_table,
    validation,
)
from pyro_recursive.datasets import CURVES, Curve, curve
from pyro_recursive.mapa import Table

SEEDS_OF_A_DRAW = 100  # initial networks of one draw are not those of another
NEIGHBOURS = 128  # that a row of the table keeps
CURVES_OF_COST = ("MAPA", "pooled", "IWAE")  # and a number of samples
PASSES = (0.1, 30.0)  # the axis: from less than the fewest to more than an IWAE's most
KDE = "KDE"
ALL = 500  # codes: as many as there are training points, or more
COMPARED = "MAPA 5"  # its index posteriors, for two networks

METHODS: dict[str, Method] = {
    BASELINE: Method(1),
    **{f"IWAE {s}": Method(s) for s in (5, 10, 20)},
    **{f"MAPA {s}": independent(s) for s in (1, 5, 10, 20)},
    "pooled .2": pooled(0.2, top=0),
    "pooled .5": pooled(0.5, top=0),
    **{f"pooled {s}": pooled(s) for s in (1, 2)},
    "MAPA true 5": independent(5, top=0, table=true_table),
    "uniform 5": independent(5, top=0, table=lambda x: Table.uniform(len(x.train), len(x.train))),
    "AE": AUTOENCODER,
    "exact sum": pooled(0, top=ALL),
    KDE: Method(),
}


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result, beside its draw; a run is resumed with the same."""

    restarts: int
    epochs: int
    rows: int = 500
    validation_rows: int = 500
    test_rows: int = 5000
    batch_size: int = 100
    rate: float = 1e-2
    hidden: int = 50
    bound_repeats: int = 5

    def data(self, name: str, seed: int) -> Curve:
        """Draw a data set."""
        sizes: Any = {"validation_rows": self.validation_rows, "test_rows": self.test_rows}
        return curve(name, self.rows, seed=seed, **sizes)


@dataclass(frozen=True)
class Block:
    """One draw of one data set, with methods to run on it."""

    dataset: str
    draw: int
    methods: tuple[str, ...]
    settings: Settings


def main(arguments: list[str]) -> None:
    """Run what is missing, print tables, write JSON and a picture."""
    parser = base_parser("mapa", __doc__)
    parser.add_argument("--datasets", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--draws", type=int, default=10, help="data sets of each kind")
    parser.add_argument("--restarts", type=int, default=2, help="initial networks of each draw")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--resume", action="store_true", help="go on after an interrupt")
    options = parse(parser, arguments, epochs=2, workers=1)
    few = {"rows": 40, "validation_rows": 30, "test_rows": 60, "batch_size": 20, "hidden": 8}
    settings = Settings(options.restarts, options.epochs, **(few if options.smoke else {}))
    if options.smoke:
        options.draws, options.datasets = min(options.draws, 2), options.datasets[:2]
    folder = Path(options.output)
    results = stored(folder, asdict(settings), options.resume, "draws")
    results["hardware"] = {**hardware(), "threads": 1, "workers": options.workers}
    blocks = [
        Block(name, draw, (method,), settings)
        for draw, name, method in product(range(options.draws), options.datasets, options.methods)
        if method not in results["draws"].get(name, {}).get(str(draw), {})
    ]
    for block, found in tqdm(_all(blocks, options.workers), total=len(blocks), desc="blocks"):
        of_data = results["draws"].setdefault(block.dataset, {})
        of_data.setdefault(str(block.draw), {}).update(found)
        write_json(folder / "results.json", results)
    known = results.setdefault("posteriors", {})
    for name in options.datasets if COMPARED in options.methods else ():
        if name not in known:
            known[name] = index_posteriors(settings.data(name, 0), METHODS[COMPARED], settings)
            write_json(folder / "results.json", results)
    pictures = [folder / "costs.png"]
    plot(results, pictures[0])
    shown = {name: found for name, found in known.items() if "diverged" not in found}
    if shown:
        pictures.append(folder / "posteriors.png")
        plot_posteriors(shown, {name: settings.data(name, 0) for name in shown}, pictures[1])
    finish(results, folder / "results.json", report(results), pictures)


def _all(blocks: list[Block], workers: int) -> Iterator[tuple[Block, dict[str, Any]]]:
    """Run blocks, in processes if there are to be several; yield each as it is done."""
    if workers == 1:
        yield from map(run, blocks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with context.Pool(workers) as pool:
        yield from pool.imap_unordered(run, blocks)


def run(block: Block) -> tuple[Block, dict[str, Any]]:
    """Return a block and the scores of its methods."""
    torch.set_num_threads(1)
    data = block.settings.data(block.dataset, block.draw)
    truth, found = data.evidence(data.test), {}
    with pyro.validation_enabled(False):
        for name in tqdm(block.methods, desc=f"{block.dataset} {block.draw}", leave=False):
            if name == KDE:
                found[name] = density_estimate(data, truth)
            else:
                found[name] = _of_method(name, data, truth, block)
    return block, found


def learner_of(name: str, data: Curve, hidden: int, seed: int) -> Learner:
    """Return a method with the initial networks of a seed."""
    method = METHODS[name]
    neighbours = ALL if method.options.get("top") == ALL else NEIGHBOURS
    return build(method, CurveData(data, hidden), seed, neighbours)


def _of_method(name: str, data: Curve, truth: Tensor, block: Block) -> dict[str, Any]:
    """Train each restart, and evaluate the one that is best on validation on the test points."""
    settings, failures = block.settings, []
    runs: list[tuple[float, Learner, dict[str, float]]] = []
    for restart in range(settings.restarts):
        seed = SEEDS_OF_A_DRAW * block.draw + restart
        try:
            learner = learner_of(name, data, settings.hidden, seed)
            cost = train(learner, seed, settings.epochs, settings.batch_size, settings.rate)
            runs.append((validation(learner), learner, cost))
        except Diverged as error:
            failures.append(f"restart {restart}: {error}")
    if not runs:
        return {"failures": failures}
    best, learner, cost = max(runs, key=lambda found: found[0])
    return {
        **score(learner, truth, settings.batch_size, settings.bound_repeats),
        "validation": best,
        "validations": [found[0] for found in runs],
        "passes": cost["passes"],
        **{key: min(run[2][key] for run in runs) for key in ("seconds", "processor_seconds")},
        "failures": failures,
    }


# The report.

Draws = dict[str, dict[str, Any]]  # of one data set: draw to method to scores


def report(results: Results) -> str:
    """Return a table for each data set, all in nats per point but the costs.

    KL, gap: mean ± standard deviation over draws; "vs VAE": mean of the differences within a draw ±
    its standard error.
    """
    tables = [_of_data(name, draws) for name, draws in results["draws"].items() if draws]
    if found := results.get("posteriors"):
        tables.append(divergences(found))
    return "\n\n".join(tables)


def _of_data(name: str, draws: Draws) -> str:
    methods = [method for method in METHODS if any(method in runs for runs in draws.values())]
    rows = [[method, *(cell(draws, method) for cell in COLUMNS.values())] for method in methods]
    failed = [
        f"{method}, draw {draw}: {failure}"
        for draw, runs in draws.items()
        for method in methods
        for failure in runs.get(method, {}).get("failures", [])
    ]
    return "\n".join([f"{name}, {len(draws)} draws", table(["method", *COLUMNS], rows), *failed])


def values(draws: Draws, method: str, key: str) -> Tensor:
    """Return the numbers of a method, one for each draw that has one: ``[draws]``."""
    found = (runs.get(method, {}).get(key) for runs in draws.values())
    return torch.tensor([x for x in found if x is not None], dtype=torch.float64)


def _spread(draws: Draws, method: str, key: str) -> str:
    return spread(values(draws, method, key), digits=3)


def _mean(draws: Draws, method: str, key: str, digits: int) -> str:
    found = values(draws, method, key)
    return f"{found.mean():.{digits}f}" if len(found) else ""


def _median(draws: Draws, method: str) -> str:
    """Return the median, which a run that stayed on a plateau does not move."""
    found = values(draws, method, "kl")
    return f"{found.quantile(0.5):.3f}" if len(found) else ""


def _versus(draws: Draws, method: str) -> str:
    """Return the test KL less the VAE's, over the draws that have both."""
    pairs = ([runs.get(n, {}).get("kl") for n in (method, BASELINE)] for runs in draws.values())
    both = [a - b for a, b in pairs if a is not None and b is not None]
    if method == BASELINE or not both:
        return ""
    return with_error(torch.tensor(both, dtype=torch.float64), sign=True, digits=3)


COLUMNS: dict[str, Callable[[Draws, str], str]] = {
    "test KL": partial(_spread, key="kl"),
    "median": _median,
    "vs VAE": _versus,
    "KL of codes": partial(_spread, key="kl_of_codes"),
    "passes/point": partial(_mean, key="passes", digits=2),
    "seconds": partial(_mean, key="seconds", digits=1),
    "processor": partial(_mean, key="processor_seconds", digits=1),
    "gap": partial(_spread, key="gap"),
}


def plot(results: Results, path: Path) -> None:
    """Draw test KL against decoder passes."""
    draws = {name: found for name, found in results["draws"].items() if found}
    with figure(path, 1, len(draws), 90, figsize=(3.1 * len(draws), 2.9)) as (drawn, axes):
        for panel, (name, found) in zip(axes[0], draws.items(), strict=True):
            _draw_costs(panel, found)
            panel.set(title=name, xlabel="decoder passes per point", xscale="log", xlim=PASSES)
        axes[0][0].set_ylabel("test KL, nats")
        labels = axes[0][0].get_legend_handles_labels()
        drawn.legend(*labels, loc="outside right center", fontsize=8)


def _draw_costs(panel: Any, found: Draws) -> None:
    """Draw test KL against passes: a line for each kind of method, a mark for each other one."""
    methods = dict.fromkeys(method for runs in found.values() for method in runs)
    cost = {
        method: tuple(values(found, method, key).mean().item() for key in ("passes", "kl"))
        for method in methods
        if len(values(found, method, "kl"))
    }
    if KDE in cost:
        panel.axhline(cost.pop(KDE)[1], color="0.5", linestyle="--", label=KDE)
    lines: dict[str, list[tuple[float, ...]]] = {title: [] for title in CURVES_OF_COST}
    for method in list(cost):
        title, _, samples = method.partition(" ")
        if title in lines and samples.replace(".", "").isdigit():
            lines[title].append(cost.pop(method))
    if BASELINE in cost:
        lines["IWAE"].append(cost.pop(BASELINE))
    for number, (title, line) in enumerate(lines.items()):
        x, y = zip(*sorted(line), strict=True) if line else ((), ())
        panel.plot(x, y, "o-", color=color(number), label=title, markersize=4)
    for number, (method, point) in enumerate(cost.items()):
        panel.plot(*point, "sDv^<>P"[number % 7], color=color(number + 3), label=method)
    if any(y > 0 for line in panel.lines for y in line.get_ydata()):  # else no log axis
        panel.set_yscale("log")
