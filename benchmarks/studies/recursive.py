"""Recursive mixtures beside a VAE, wider encoders, mixtures, flows and learned priors.

All methods have the same decoder with the same first weights, and at most 4 decoder passes an image
and step, so that equal epochs are equal steps and decoder passes; "at the VAE's time" compares the
validation bounds after as many seconds of training as the faster of both took. A schedule "early"
has 5 % of the steps for the first component and for each further one, and the rest for all
together.
"""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from benchmarks import guides
from benchmarks.methods.guides import LONGER, METHODS
from benchmarks.refinement import gap_of, gap_parts
from benchmarks.report import (
    BASELINE,
    Column,
    Results,
    draw_bars,
    draw_learning,
    draw_values,
    figure,
    means,
    method_table,
    spread,
)
from benchmarks.run import Method, Settings, Task
from benchmarks.studies.planes import PLANE_COLUMNS, with_plane
from benchmarks.studies.study import Study, hours, seconds_per_epoch
from pyro_recursive import MixtureGuide, RecursiveMixtureGuide
from pyro_recursive.evaluation import active_units, mixture_diversity, rate_of

GAP_POINTS = 100


def evaluate(method: Method, task: Task, settings: Settings) -> dict[str, Any]:
    """Return scores, sizes, KL, active units, gaps, and the diversity of mixtures."""
    found = guides.evaluate(method, task, settings)
    rows = task.test[:GAP_POINTS]
    found["kl"] = rate_of(method.vae.model, method.guide, rows).kl.item()
    found["active_units"] = active_units(method.guide, task.test).number
    if isinstance(method.guide, MixtureGuide | RecursiveMixtureGuide):
        found["diversity"] = mixture_diversity(method.guide, rows).divergence.mean().item()
    found["gaps"] = gap_parts(method, rows, settings.eval_samples)
    return with_plane(found, method, task, settings)


def _at_time(name: str, results: Results) -> str:
    """Return the validation bound less the VAE's, after the seconds that the faster of both has."""
    base, found = results["runs"].get(BASELINE, {}), list[float]()
    for seed, run in results["runs"][name].items():
        if seed in base:
            both = [each["history"] for each in (run, base[seed])]
            clocks = [list(accumulate(history["seconds"])) for history in both]
            end = min(clock[-1] for clock in clocks)
            places = [bisect_right(clock, end) - 1 for clock in clocks]
            if min(places) < 0:  # one had not ended its first epoch by then
                continue
            values = [-h["validation"][p] for h, p in zip(both, places, strict=True)]
            found.append((values[0] - values[1]) / both[0]["validation_rows"])
    return spread(torch.tensor(found), sign=True)


def _numbers(key: str) -> Column:
    def cell(name: str, results: Results) -> str:
        runs = {seed: run for seed, run in results["runs"][name].items() if key in run}
        return spread(means(runs, key))

    return cell


TITLES = ("test log p", "vs VAE", "bits/dim", "ELBO", "train log p", "guide, model parameters")
TABLE: dict[str, Column] = {
    **{title: guides.COLUMNS[title] for title in (*TITLES, "members")},
    "at the VAE's time": _at_time,
    "approximation gap": lambda n, r: spread(gap_of(r["runs"][n], "approximation")),
    "amortisation gap": lambda n, r: spread(gap_of(r["runs"][n], "amortisation")),
    "KL to the prior": _numbers("kl"),
    "active units": lambda n, r: ", ".join(str(v["active_units"]) for v in r["runs"][n].values()),
    "diversity": _numbers("diversity"),
    **PLANE_COLUMNS,
    "s/epoch": seconds_per_epoch,
    "hours": hours,
}


def report(results: Results) -> str:
    """Return the table, in nats per image: mean ± standard deviation over seeds."""
    return method_table("guide", TABLE, results)


def plot(results: Results, path: Path) -> None:
    """Draw log p(x) and ELBO of every seed, the two gaps, and learning curves."""
    runs = results["runs"]
    with figure(path, 1, 3, figsize=(18, 6)) as (drawn, axes):
        values, parts, curves = axes[0]
        draw_values(values, results, {"o": ("test", "log_p"), "|": ("test", "elbo")})
        values.set(xlabel="nats per test image", title="log p(x) (dots) and ELBO (bars), by seed")
        kinds = ("approximation", "amortisation")
        bars = {kind: {n: gap_of(r, kind).mean().item() for n, r in runs.items()} for kind in kinds}
        draw_bars(parts, bars)
        parts.set(xlabel="nats per test image", title="log p(x) - ELBO, in its two parts")
        if runs:
            draw_learning(curves, results, "IWAE-16")
        settings = results["settings"]
        pixels = [settings[key] for key in ("likelihood", "decoder") if key in settings]
        drawn.suptitle(", ".join([settings["dataset"], *pixels, f"{settings['epochs']} epochs"]))


STUDY = Study(
    {**METHODS, **LONGER},
    evaluate,
    report,
    plot,
    datasets=("mnist",),
    networks=("200-2", "200-10", "200-20", "200-50"),
    validation_particles=16,
    train_points=100,
)
