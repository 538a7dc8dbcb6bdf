"""Guides at convergence, and the same runs at equal steps, decoder passes and processor time.

Each run trains until its validation bound (IWAE-8, fixed draws and images) has not improved for 20
epochs of about 1,000 steps (988 on the digits), 200 epochs at most; Adam's rate is halved after
each 5 epochs without an improvement. Then it has the parameters of its best epoch: "at convergence"
is on test images, and they choose nothing. Recursive mixtures of two grow in the first 1 % of 200
epochs, of four in the first 2 %; "members" are the components that each seed has in the end, 1
where it is a single Gaussian.

"At equal ..." are differences to the VAE in the best validation bound so far: after the epochs that
the VAE took to within 0.02 nats of its best bound, or a tenth of these (whole ones, at least one),
or after as much processor time, for which the other's bound is interpolated between its epochs. A
run that has stopped before keeps its bound. Each step of each method has 4 decoder passes an image
(3 while a recursive mixture has three components), so that equal steps are equal decoder passes.
Time is the median processor time of an epoch, which leaves out compilation, times the epochs; a run
whose times are not known (resumed from a checkpoint alone) is left out.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from benchmarks import guides
from benchmarks.methods.guides import TO_CONVERGENCE
from benchmarks.report import (
    BASELINE,
    Column,
    Results,
    Runs,
    color,
    figure,
    means,
    method_table,
    name_rows,
    spread,
    versus,
    with_error,
)
from benchmarks.run import Method, Settings, Task
from benchmarks.studies.planes import PLANE_COLUMNS, with_plane
from benchmarks.studies.study import Study, hours

Run = dict[str, Any]
CLOSE = 0.02  # nats per row
ROUNDING = 1e-9  # of a number of epochs


def best_bounds(run: Run) -> list[float]:
    """Return the best validation bound up to each epoch, in nats per row."""
    history = run["history"]
    return list(accumulate((-v / history["validation_rows"] for v in history["validation"]), max))


def best_epoch(run: Run) -> int:
    """Return the epoch with the best validation bound, whose parameters were kept."""
    bounds = best_bounds(run)
    return bounds.index(bounds[-1]) + 1


def end_epoch(run: Run) -> int:
    """Return the first epoch whose validation bound is within `CLOSE` nats of the best."""
    bounds = best_bounds(run)
    return next(n for n, bound in enumerate(bounds, 1) if bound >= bounds[-1] - CLOSE)


def epoch_seconds(run: Run) -> float:
    """Return the median processor seconds of an epoch, NaN where none are stored."""
    return median(run["epoch_processor_seconds"] or [math.nan])


def bound_after(run: Run, epochs: float) -> float:
    """Return the best bound after so many epochs, or after the last one; NaN within the first.

    Linear between two epochs.
    """
    bounds = best_bounds(run)
    if not epochs >= 1 - ROUNDING:
        return math.nan
    last = min(max(epochs, 1.0), len(bounds))
    before = int(last)
    after = min(before + 1, len(bounds))
    return bounds[before - 1] + (last - before) * (bounds[after - 1] - bounds[before - 1])


def at_equal(name: str, results: Results, unit: Callable[[Run], float], share: float) -> str:
    """Return the difference to the VAE after a share of its epochs to the end, at equal cost."""
    base, found = results["runs"].get(BASELINE, {}), list[float]()
    for seed, run in results["runs"][name].items():
        if seed in base:
            epochs = max(1, int(share * end_epoch(base[seed]) + ROUNDING))
            own = bound_after(run, epochs * unit(base[seed]) / unit(run))
            found.append(own - bound_after(base[seed], epochs))
    known = [value for value in found if not math.isnan(value)]
    return with_error(torch.tensor(known), sign=True) if known else ""


def _mean(of: Callable[[Run], float], digits: int = 0) -> Column:
    def cell(name: str, results: Results) -> str:
        known = _known(of, results["runs"][name])
        return f"{fmean(known):,.{digits}f}" if known else ""

    return cell


def _known(of: Callable[[Run], float], runs: Runs) -> list[float]:
    """Return a number of each run that has it."""
    return [value for value in map(of, runs.values()) if not math.isnan(value)]


def _steps(run: Run) -> int:
    return run["history"]["steps"][best_epoch(run) - 1]


def _minutes(run: Run) -> float:
    return best_epoch(run) * epoch_seconds(run) / 60


def _difference(key: str) -> Column:
    return lambda name, results: with_error(versus(name, results, "test", key), sign=True)


def evaluate(method: Method, task: Task, settings: Settings) -> dict[str, Any]:
    """Return scores and sizes; with two latents, exact ones of some images."""
    return with_plane(guides.evaluate(method, task, settings), method, task, settings)


EQUAL = {"steps": lambda run: 1.0, "time": epoch_seconds}
TABLE: dict[str, Column] = {
    "test log p": lambda n, r: spread(means(r["runs"][n], "test", "log_p")),
    "at convergence: log p": _difference("log_p"),
    "ELBO": _difference("elbo"),
    **{
        f"at equal {kind}{' / 10' if share < 1 else ''}": partial(at_equal, unit=unit, share=share)
        for kind, unit in EQUAL.items()
        for share in (1.0, 0.1)
    },
    "steps to the best": _mean(_steps),
    "steps": _mean(lambda run: run["history"]["steps"][-1]),
    "minutes to the best": _mean(_minutes, 1),
    "hours": hours,
    **{title: guides.COLUMNS[title] for title in ("guide, model parameters", "members")},
    **PLANE_COLUMNS,
}


def report(results: Results) -> str:
    """Return the table, nats per image: mean ± standard deviation of log p over seeds.

    Differences are to the VAE with the same seed, ± a standard error over seeds.
    """
    return method_table("guide", TABLE, results)


def plot(results: Results, path: Path) -> None:
    """Draw differences in test log p for each seed, and the best bound over steps and time."""
    runs, settings = results["runs"], results["settings"]
    with figure(path, 1, 3, figsize=(19, 6)) as (drawn, axes):
        final, steps, time = axes[0]
        for number, name in enumerate(runs):
            found = versus(name, results, "test", "log_p")
            final.plot(found, [number] * len(found), "o", color=color(number), alpha=0.7)
            style = "-" if number < 10 else "--"
            for panel, unit in ((steps, _step_axis), (time, _time_axis)):
                curves = [best_bounds(run) for run in runs[name].values()]
                count = max(map(len, curves))
                whole = [curve + curve[-1:] * (count - len(curve)) for curve in curves]
                mean = torch.tensor(whole).mean(0)
                width = fmean(_known(unit, runs[name]) or [math.nan])
                places = width * torch.arange(1, count + 1)
                panel.plot(places, mean, style, color=color(number), label=name)
        name_rows(final, runs)
        final.axvline(0, color="black", linewidth=0.8)
        final.set(xlabel="nats per test image", title="log p(x) less the VAE's, by seed")
        if runs:
            ends = [best_bounds(run)[-1] for each in runs.values() for run in each.values()]
            for panel, label in ((steps, "steps"), (time, "processor minutes")):
                panel.set(xscale="log", xlabel=label, ylabel="IWAE-8 (nats per image)")
                panel.set_title("best validation bound so far, mean over seeds")
                panel.set_ylim(min(ends) - 4, max(ends) + 0.5)
            steps.legend(fontsize=7, ncols=2)
        drawn.suptitle(f"{settings['dataset']}, networks {settings['hidden']}-{settings['latent']}")


def _step_axis(run: Run) -> float:
    return run["history"]["steps"][0]


def _time_axis(run: Run) -> float:
    return epoch_seconds(run) / 60


STUDY = Study(
    TO_CONVERGENCE,
    evaluate,
    report,
    plot,
    datasets=("digits", "mnist-14"),
    networks=("64-20",),
    validation_particles=8,
    train_points=300,
    epochs=200,
    batch_size=50,
    eval_points=2000,
    epoch_steps=1000,
    patience=20,
    scheduler=partial(ReduceLROnPlateau, factor=0.5, patience=4, threshold=0.0),
)
