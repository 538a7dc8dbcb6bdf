"""Tables and plots of the benchmark `posteriordb`."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.methods import posteriordb_numpyro as in_numpyro
from benchmarks.methods.posteriordb import METHODS
from benchmarks.report import Results, color, figure, table

BASELINE = "NUTS dense"
GOOD, POOR, TRUSTED = 0.1, 0.3, 0.7  # errors, and the k-hat below which weights are trusted
# Not in the overview: a funnel, the one with the most costly draws, and those with many modes.
APART = (
    "eight_schools-eight_schools_centered",
    "hudson_lynx_hare-lotka_volterra",
    "labels",
    "square",
)
SHORT = {
    "arK-arK": "arK",
    "arma-arma11": "arma",
    "bball_drive_event_0-hmm_drive_0": "hmm",
    "diamonds-diamonds": "diamonds",
    "earnings-logearn_interaction": "earnings",
    "eight_schools-eight_schools_noncentered": "schools",
    "eight_schools-eight_schools_centered": "centred",
    "garch-garch11": "garch",
    "gp_pois_regr-gp_pois_regr": "gp",
    "hudson_lynx_hare-lotka_volterra": "lotka",
    "kidiq-kidscore_interaction": "kidiq",
    "kilpisjarvi_mod-kilpisjarvi": "kilpis",
    "low_dim_gauss_mix-low_dim_gauss_mix": "mix",
    "mesquite-mesquite": "mesquite",
    "nes2000-nes": "nes",
    "sblrc-blr": "blr",
}
Row = dict[str, Any]  # the numbers of one run


def error(run: Row, kind: str = "scores") -> float:
    """Return the largest error of means and standard deviations, infinite for a failure."""
    if "fails" in run:
        return math.inf
    scores: Row = run[kind if kind in run else "scores"]
    return finite(max(scores["mean"][0], scores["sd"][0]))


def finite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def best(run: Row) -> float:
    """Return the error of what a user would take: of weighted draws where k-hat trusts them."""
    return error(run, "weighted" if is_trusted(run) else "scores")


def is_trusted(run: Row) -> bool:
    """Whether k-hat is below 0.7; that of samplers, which have none, counts as low."""
    return "fails" not in run and run.get("pareto_k", 0.0) < TRUSTED


def ratios(results: Results, method: str) -> list[float]:
    """Return the gradients of each run over those of the same seed of NUTS from cold."""
    found = []
    for name, runs in results["runs"].items():
        if name in APART and len(results["runs"]) > len(APART):
            continue
        base = runs.get(BASELINE, {})
        for seed, run in runs.get(method, {}).items():
            if "gradients" in run and "gradients" in base.get(seed, {}):
                found.append(run["gradients"] / base[seed]["gradients"])
    return found


def tables(results: Results) -> str:
    """Return a row for each method over all posteriors, errors on each, and times of steps."""
    parts = [overview(results), matrix(results)]
    return "\n\n".join([*parts, of_steps(results)] if "steps" in results else parts)


def report(results: Results) -> str:
    """Return the tables over all posteriors, then one of each."""
    parts = [tables(results)]
    for name, runs in results["runs"].items():
        floor = results["floors"][name]
        parts.append(f"{SHORT.get(name, name)}: sliced distance of two halves {floor:.3f}")
        parts.append(of_posterior(runs))
    return "\n\n".join(parts)


def overview(results: Results) -> str:
    """Return how often each method was good, and what it cost."""
    header = [
        "method",
        "runs",
        "fail",
        f"error <= {GOOD}",
        f"<= {POOR}",
        "median",
        f"weighted, k-hat < {TRUSTED}",
        f"<= {GOOD}",
        f"> {POOR}",
        "gradients",
        "of NUTS's",
        "s",
    ]
    rows = [_overview_row(name, results) for name in methods_of(results)]
    return table(header, rows)


def matrix(results: Results) -> str:
    """Return the worst error of each method on each posterior.

    Of weighted draws where k-hat is below 0.7; a star where it is not. Samplers have no k-hat.
    """
    header = ["largest error", *(SHORT.get(name, name) for name in results["runs"])]
    rows = [
        [method, *(_cell([*runs.get(method, {}).values()]) for runs in results["runs"].values())]
        for method in methods_of(results)
    ]
    return table(header, rows)


def _cell(runs: list[Row]) -> str:
    if not runs:
        return ""
    if any("fails" in run for run in runs):
        return "fails"
    worst = max(runs, key=best)
    mark = "" if is_trusted(worst) else "*"
    return f"{best(worst):.2g}{mark}" if best(worst) < 100 else f"> 100{mark}"


def of_steps(results: Results) -> str:
    """Return the processor's milliseconds of training steps, and the seconds of compiling."""
    rows = [
        [name, method, *(f"{cost[key]:.2f}" for key in ("eager", "compiled", "compiling"))]
        for name, of_methods in results.get("steps", {}).items()
        for method, cost in of_methods.items()
    ]
    return table(["posterior", "method", "eager, ms a step", "compiled", "compiling, s"], rows)


def methods_of(results: Results) -> list[str]:
    """Return the methods that have runs, in the order of the benchmark."""
    found = {name for runs in results["runs"].values() for name in runs}
    known = [name for name in (*METHODS, *in_numpyro.METHODS) if name in found]
    return [*known, *sorted(found - {*known})]


def runs_of(results: Results, method: str) -> list[Row]:
    """Return the runs on the posteriors of the overview; on all where there are no others."""
    every = results["runs"]
    names = [name for name in every if name not in APART] or list(every)
    return [run for name in names for run in every[name].get(method, {}).values()]


def _overview_row(method: str, results: Results) -> list[str]:
    runs = runs_of(results, method)
    errors, trusted = (
        [error(run) for run in runs],
        [r for r in runs if is_trusted(r) and "pareto_k" in r],
    )
    weighted = [error(run, "weighted") for run in trusted]
    gradients = [run["gradients"] for run in runs if "gradients" in run]
    ratio = ratios(results, method)
    return [
        method,
        str(len(runs)),
        str(sum("fails" in run for run in runs)),
        str(_count(errors, lambda value: value <= GOOD)),
        str(_count(errors, lambda value: value <= POOR)),
        number(median(errors)) if errors else "",
        str(len(trusted)),
        str(_count(weighted, lambda value: value <= GOOD)),
        str(_count(weighted, lambda value: value > POOR)),
        f"{median(gradients):.0f}" if gradients else "",
        f"{median(ratio):.2f}" if ratio else "",
        f"{median(run['seconds'] for run in runs):.1f}" if runs else "",
    ]


def _count(values: Iterable[float], holds: Callable[[float], bool]) -> int:
    return sum(map(holds, values))


def of_posterior(runs: dict[str, dict[str, Row]]) -> str:
    """Return a row for each method, with the worst of its seeds."""
    header = ["method", "seeds", "ELBO", "k-hat", "mean", "sd", "weighted", "W1", "sliced"]
    header += ["modes", "gradients", "s"]
    return table(header, [_row(name, [*seeds.values()]) for name, seeds in runs.items()])


def _row(method: str, runs: list[Row]) -> list[str]:
    done = [run for run in runs if "fails" not in run]
    if not done:
        reason = runs[0]["fails"]
        return [method, str(len(runs)), f"fails: {reason[:60]}", *[""] * 9]
    seeds = f"{len(runs)}" + (f", {len(runs) - len(done)} fail" if len(done) < len(runs) else "")

    def worst(kind: str, key: str) -> str:
        return number(max(_largest(run[kind][key]) for run in done)) if kind in done[0] else ""

    def of_runs(key: str, choose: Callable[..., float], digits: int = 2) -> str:
        values = [run[key] for run in done if key in run]  # NUTS has no ELBO
        return f"{choose(values):.{digits}f}" if values else ""

    weighted = f"{worst('weighted', 'mean')}/{worst('weighted', 'sd')}"
    return [
        method,
        seeds,
        of_runs("elbo", min),
        of_runs("pareto_k", max),
        worst("scores", "mean"),
        worst("scores", "sd"),
        weighted if "weighted" in done[0] else "",
        worst("scores", "wasserstein"),
        worst("scores", "sliced"),
        of_runs("modes", min, 0),
        of_runs("gradients", max, 0),
        of_runs("seconds", max, 1),
    ]


def _largest(value: Any) -> float:
    return finite(value[0] if isinstance(value, list | tuple) else value)


def number(value: float) -> str:
    """Return a number with three digits or so."""
    return f"{value:.2f}" if value < 100 else f"{value:.1e}"


# Plots.

TOP = 30.0  # errors above are drawn here
GRADIENTS = 10, 1e6
MARKERS = "osD^v<>"  # as many as repeat with other colours


def plot(results: Results, path: Path) -> None:
    """Draw the error of every method on each posterior against its gradients, worst seed.

    Hollow where k-hat is 0.7 or more; else of weighted draws.
    """
    names, columns = list(results["runs"]), 4
    rows = -(-len(names) // columns)
    methods = methods_of(results)
    with figure(path, rows, columns, 70, figsize=(20, 3.6 * rows), sharex=True, sharey=True) as (
        drawn,
        axes,
    ):
        for panel, name in zip(axes.flat, names, strict=False):
            for index, method in enumerate(methods):
                runs = [r for r in results["runs"][name].get(method, {}).values() if "scores" in r]
                if runs:
                    worst = max(runs, key=best)
                    point = max(r["gradients"] for r in runs), max(0.011, min(best(worst), TOP))
                    panel.plot(*point, **_style(index, method, is_trusted(worst)))
            panel.axhline(GOOD, color="0.7", linewidth=0.8)
            panel.set(
                xscale="log",
                yscale="log",
                xlim=GRADIENTS,
                ylim=(0.01, 1.5 * TOP),
                title=SHORT.get(name, name),
            )
        for panel in axes[:, 0]:
            panel.set_ylabel("largest error (sds)")
        for panel in axes[-1]:
            panel.set_xlabel("gradients of log p")
        for panel in axes.flat[len(names) :]:
            panel.set_visible(False)
        lines = [drawn_line(axes[0, 0], index, method) for index, method in enumerate(methods)]
        drawn.legend(handles=lines, loc="outside right upper", fontsize=10)


def drawn_line(panel: Any, index: int, method: str) -> Any:
    (line,) = panel.plot([], [], **_style(index, method))
    return line


def _style(index: int, method: str, is_filled: bool = True) -> dict[str, Any]:
    return {
        "markerfacecolor": color(index) if is_filled else "none",
        "marker": MARKERS[index % len(MARKERS)],
        "color": color(index),
        "linestyle": "",
        "markersize": 8,
        "alpha": 0.8,
        "label": method,
    }


CLASSES = (
    (f"error <= {GOOD}", GOOD, "#2a7f3f"),
    (f"<= {POOR}", POOR, "#9bcf8a"),
    ("<= 1", 1.0, "#f2c14e"),
    ("more", math.inf, "#c8553d"),
)


def plot_overview(results: Results, path: Path) -> None:
    """Draw how many runs of each method have which error, and its gradients."""
    methods = methods_of(results)
    with figure(path, 1, 2, figsize=(13, 0.33 * len(methods) + 1.5), sharey=True) as (_, axes):
        shares, costs = axes[0]
        for index, method in enumerate(methods):
            runs = runs_of(results, method)
            values = [best(run) for run in runs if "fails" not in run]
            left, low = 0.0, -math.inf
            for label, high, shade in CLASSES:
                share = sum(low < value <= high for value in values) / max(1, len(runs))
                shares.barh(index, share, left=left, color=shade, label=label if not index else "")
                left, low = left + share, high
            failed = 1 - len(values) / max(1, len(runs))
            shares.barh(index, failed, left=left, color="0.6", label="fails" if not index else "")
            gradients = [run["gradients"] for run in runs if "gradients" in run]
            costs.plot(gradients, [index] * len(gradients), "|", color=color(index), alpha=0.5)
            if gradients:
                costs.plot(median(gradients), index, "o", color=color(index))
        counts = [f"{method} ({len(runs_of(results, method))})" for method in methods]
        shares.set_yticks(range(len(methods)), counts)
        shares.yaxis.set_inverted(True)
        shares.set(xlim=(0, 1), xlabel="share of the runs, whose number is in brackets")
        shares.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, fontsize=8)
        costs.set(xscale="log", xlim=GRADIENTS, xlabel="gradients of log p (median: dot)")
