"""The benchmark of refinement: amortised, semi-amortised and free inference of one VAE.

On images; and on synthetic sequences, with a decoder to learn ("sequences"; "long-sequences" with
one that reads the previous symbol alone) or with the true one, for inference alone
("sequences-known"). Each method is evaluated on test rows by log p(x)
(IWAE-5000), the ELBO, and the two parts of their difference, the approximation and the amortisation
gap; by KL, mutual information and active units; and by the cost of training, of a step, and of
inference for a row.
"""

import argparse
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from benchmarks.experiment import Experiment, evidence
from benchmarks.methods.refinement import METHODS
from benchmarks.report import (
    Column,
    Results,
    Runs,
    color,
    draw_bars,
    draw_learning,
    draw_values,
    figure,
    means,
    method_table,
    spread,
    training_ratio,
    versus,
)
from benchmarks.run import Method, Settings, Task, parse, training_parser
from benchmarks.tasks import sequences
from benchmarks.tasks.images import image_task, sizes
from benchmarks.tasks.sequences import sequence_task
from pyro_recursive import gaps
from pyro_recursive.evaluation import active_units, rate_of, saliency
from pyro_recursive.evaluation.search import Search

SALIENCY_DRAWS = 5
EPOCHS = {"digits": 60, "sequences": 6, "sequences-known": 6}  # 5 elsewhere


@dataclass(frozen=True)
class RefinementSettings(Settings):
    """What determines a result, beside method and seed."""

    refinements: int = 10
    gap_points: int = 100


def main(arguments: list[str]) -> None:
    """Train, evaluate, print the table; write JSON and a plot."""
    parser = training_parser("refinement", __doc__, METHODS, sequences.DATASETS)
    parser.add_argument("--refinements", type=int, default=10, help="steps of each refinement")
    parser.add_argument("--gap-points", type=int, default=100, help="rows to measure gaps on")
    options = parse(parser, arguments, gap_points=10, refinements=3)
    if options.dataset == "sequences-known":  # no steps of the model to hold back
        options.methods = [name for name in options.methods if name != "aggressive"]
    settings = RefinementSettings.of(
        options,
        epochs=options.epochs or EPOCHS.get(options.dataset, 5),
        **(sequences.SIZES if options.dataset in sequences.DATASETS else sizes(options.dataset)),
    )
    task = task_of(settings, options)
    experiment = Experiment(settings, task, METHODS, options)
    experiment.run(evaluate)
    if task.exact is not None:
        experiment.results["true model"] = task.exact().mean().item()
    experiment.time()
    experiment.finish(report, plot)


def task_of(settings: Settings, options: argparse.Namespace, train_points: int = 1) -> Task:
    """Return the task of a data set of images or of sequences."""
    of_sequences = settings.dataset in sequences.DATASETS
    return (sequence_task if of_sequences else image_task)(settings, options, train_points)


def evaluate(method: Method, task: Task, settings: RefinementSettings) -> dict[str, Any]:
    """Return what the method learned, in nats: lists are over rows.

    ``saliency`` is the mean over rows of that of each symbol or pixel, in nats per unit of z.
    """
    model, guide, samples, rows = method.vae.model, method.guide, settings.eval_samples, task.test
    scores = evidence(method, rows, samples)
    few = rows[: settings.gap_points]
    pyro.set_rng_seed(0)  # the draws below are the same if `evidence` read its scores from a file
    rate = rate_of(model, guide, rows)
    return {
        **scores,
        "kl": rate.kl.item(),
        "mutual_information": rate.mutual_information.item(),
        "active_units": active_units(guide, rows).number,
        "gaps": gap_parts(method, few, samples),
        "saliency": saliency(model, guide, few, num_draws=SALIENCY_DRAWS).mean(0).tolist(),
    }


def gap_parts(method: Method, rows: Tensor, samples: int) -> dict[str, list[float]]:
    """Return log p(x), the ELBO, and the best ELBO of the guide's family, of each row in nats."""
    search = Search(draws=10, steps=min(1000, samples), window=50, patience=3)
    found = gaps(method.vae.model, method.guide, rows, num_particles=samples, search=search)
    parts = {name: getattr(found, name) for name in ("log_marginal", "elbo", "best", "start")}
    return {name: v.tolist() for name, v in parts.items() if v is not None}


# The report.


def report(results: Results) -> str:
    """Return the table, in nats per row: mean ± standard deviation over seeds.

    Training (processor time) and step are ratios to the VAE's; "closed" is the share of the
    amortisation gap that refinement closes.
    """
    text = method_table("method", COLUMNS, results)
    if "true model" in results:
        text += f"\n\nThe true model's log p(x): {results['true model']:.2f} nats per row."
    return text


GAPS = {
    "approximation": lambda g: g["log_marginal"] - g["best"],
    "amortisation": lambda g: g["best"] - g["elbo"],
    "closed": lambda g: (g["elbo"] - g["start"]) / (g["best"] - g["start"]),
}


def gap_of(runs: Runs, kind: str) -> Tensor:
    """Return a gap for each seed, of the means over rows; NaN where it has no meaning."""
    nowhere = {"start": torch.tensor(torch.nan)}
    each = [{n: torch.tensor(v).mean() for n, v in run["gaps"].items()} for run in runs.values()]
    return torch.stack([GAPS[kind](nowhere | mean) for mean in each])


def _closed(name: str, results: Results) -> str:
    share = gap_of(results["runs"][name], "closed")
    return "" if share.isnan().all() else f"{100 * share.mean().item():.0f} %"


def _microseconds(name: str, results: Results, alone: bool) -> str:
    batch, one = (costs["ms"][name] * 1e3 for costs in results["inference"].values())
    return f"{one:.0f}" if alone else f"{batch / results['settings']['batch_size']:.1f}"


COLUMNS: dict[str, Column] = {
    "test log p": lambda n, r: spread(means(r["runs"][n], "log_p")),
    "vs VAE": lambda n, r: spread(versus(n, r, "log_p"), sign=True),
    "ELBO": lambda n, r: spread(means(r["runs"][n], "elbo")),
    "approximation gap": lambda n, r: spread(gap_of(r["runs"][n], "approximation")),
    "amortisation gap": lambda n, r: spread(gap_of(r["runs"][n], "amortisation")),
    "closed": _closed,
    "KL": lambda n, r: spread(means(r["runs"][n], "kl")),
    "mutual information": lambda n, r: spread(means(r["runs"][n], "mutual_information")),
    "active units": lambda n, r: ", ".join(str(v["active_units"]) for v in r["runs"][n].values()),
    "training": lambda n, r: f"{training_ratio(n, r):.2f}",
    "step": lambda n, r: f"{r['steps']['ratio'][n]:.2f}",
    "inference, us a row of a batch": partial(_microseconds, alone=False),
    "us alone": partial(_microseconds, alone=True),
}


def plot(results: Results, path: Path) -> None:
    """Draw log p(x), gaps, KL and mutual information, cost against gain, learning, saliency."""
    settings, runs = results["settings"], results["runs"]
    with figure(path, 2, 3, figsize=(20, 9)) as (drawn, axes):
        (bounds, gap_axes, curves), (rate, costs, salient) = axes
        draw_values(bounds, results, {"o": ("log_p",), "|": ("elbo",)})
        if "true model" in results:
            bounds.axvline(results["true model"], color="black", linewidth=0.8)
        title = f"IWAE-{settings['eval_samples']} (dots) and ELBO (bars), by seed"
        bounds.set(xlabel="nats per test row", title=title)
        kinds = ("approximation", "amortisation")
        draw_bars(
            gap_axes, {k: {n: gap_of(r, k).mean().item() for n, r in runs.items()} for k in kinds}
        )
        gap_axes.set(xlabel="nats per test row", title="log p(x) - ELBO, in its two parts")
        keys = ("kl", "mutual_information")
        draw_bars(rate, {k: {n: means(r, k).mean().item() for n, r in runs.items()} for k in keys})
        rate.set(xlabel="nats per test row", title="KL and mutual information of the latents")
        for number, name in enumerate(runs):
            gain = versus(name, results, "log_p")
            if len(gain):
                point = (training_ratio(name, results), gain.mean().item())
                costs.plot(*point, "o", color=color(number))
                costs.annotate(name, point, xytext=(4, 4), textcoords="offset points")
        costs.set(xlabel="training time / VAE", ylabel="log p(x) - VAE's", title="gain and cost")
        costs.set_xscale("log")
        if runs:
            draw_learning(curves, results, "IWAE-16")
            _draw_saliency(salient, results)
        steps = f"{settings['refinements']} refinements"
        drawn.suptitle(f"{settings['dataset']}, {settings['epochs']} epochs, {steps}")


def _draw_saliency(axes: Any, results: Results) -> None:
    """Draw the mean over seeds, of each method: a line over symbols, or a picture of the pixels."""
    found = {
        name: torch.tensor([run["saliency"] for run in runs.values()]).mean(0)
        for name, runs in results["runs"].items()
    }
    if results["settings"]["dataset"] in sequences.DATASETS:
        for number, (name, values) in enumerate(found.items()):
            places = range(1, len(values) + 1)
            axes.plot(places, values.numpy(), ".-", color=color(number), label=name)
        axes.set(xlabel="symbol", ylabel="nats per unit of z", ylim=(0, None))
        axes.legend(fontsize=7, ncols=2)
    else:
        columns = math.ceil(math.sqrt(len(found)))
        side = math.isqrt(len(next(iter(found.values()))))
        tiles = torch.full((columns * (side + 2), columns * (side + 2)), torch.nan)
        for number, (name, values) in enumerate(found.items()):
            top, left = ((side + 2) * place for place in divmod(number, columns))
            tiles[top + 2 : top + side + 2, left : left + side] = values.view(side, side)
            axes.text(left, top + 1, name, fontsize=7)
        drawn = axes.imshow(tiles[: top + side + 2].numpy(), cmap="viridis")
        axes.figure.colorbar(drawn, ax=axes, label="nats per unit of z")
        axes.set_axis_off()
    axes.set_title("saliency of each symbol or pixel")
