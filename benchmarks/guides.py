"""The benchmark of guides: one VAE with each kind of posterior, on equal budgets.

Every method trains the same decoder from the same initial weights, with 4 samples per image and
step. Each is evaluated on test and training images by log p(x) (IWAE-5000), also in bits per
dimension, and by the ELBO, whose distance from it is the divergence that the guide leaves; and by
the number of parameters, the cost of training and the latency of inference, timed side by side.
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.experiment import Experiment, evidence
from benchmarks.methods.guides import METHODS, mixture
from benchmarks.report import (
    BASELINE,
    Results,
    draw_bars,
    draw_costs,
    draw_learning,
    draw_values,
    figure,
    means,
    method_table,
    spread,
    table,
    training_ratio,
    versus,
)
from benchmarks.run import Method, Settings, Task, count, parse, time_inference, training_parser
from benchmarks.tasks.image_sets import SMALL
from benchmarks.tasks.images import image_task, sizes

TRAIN_POINTS = 100  # training images to evaluate on, at most


def main(arguments: list[str]) -> None:
    """Train, evaluate, print the table; write JSON and a plot."""
    options = parse(training_parser("guides", __doc__, METHODS), arguments)
    epochs = options.epochs or (60 if options.dataset == "digits" else 8)
    settings = Settings.of(options, epochs=epochs, **sizes(options.dataset))
    task = image_task(settings, options, min(TRAIN_POINTS, settings.eval_points))
    experiment = Experiment(settings, task, METHODS, options)
    experiment.run(evaluate)
    experiment.time()
    mixtures = {
        f"{number} {kind}": mixture(
            task.make_vae(f"{number} {kind}"), task, settings, number, kind == "shared trunk"
        )
        for kind in ("encoders", "shared trunk")
        for number in (1, 2, 3, 4)
    }
    experiment.results["inference"] |= time_inference(
        mixtures, experiment.batch, options.timing_repeats, "1 encoders", "mixtures"
    )
    experiment.finish(report, plot)


def evaluate(method: Method, task: Task, settings: Settings) -> dict[str, Any]:
    """Return scores and sizes; parameters that guide and prior share count as the guide's."""
    guide, every = count(method.guide), count(*method.modules())
    found: dict[str, Any] = {"guide_parameters": guide, "model_parameters": every - guide}
    if hasattr(method.guide, "stage"):
        found["members"] = len(method.guide.members)
        found["stage"] = method.guide.stage.kind
    found["test"] = evidence(method, task.test, settings.eval_samples)
    found["train"] = evidence(method, task.train_sample, settings.eval_samples)
    return found


# The report.


def report(results: Results) -> str:
    """Return the tables: of all methods, and of inference in mixtures of 1 to 4 components.

    In nats per image, mean ± standard deviation over seeds; costs are ratios to the VAE.
    """
    mixtures = {k: v for k, v in results["inference"].items() if k.startswith("mixtures")}
    latency = [
        [n, *(f"{t['ms'][n]:.2f} ({t['ratio'][n]:.2f})" for t in mixtures.values())]
        for n in next(iter(mixtures.values()))["ms"]
    ]
    methods = method_table("guide", COLUMNS, results)
    return f"{methods}\n\n{table(['inference: ms (ratio)', *mixtures], latency)}"


def _bits(name: str, results: Results) -> str:
    dataset = results["settings"]["dataset"]
    pixels = 64 if dataset.startswith("digits") else 196 if dataset.endswith(SMALL) else 784
    log_p = means(results["runs"][name], "test", "log_p").mean().item()
    return f"{-log_p / (pixels * math.log(2)):.4f}"


def _missed(name: str, results: Results) -> Tensor:
    """Return log p(x) less the ELBO for each seed."""
    runs = results["runs"][name]
    return means(runs, "test", "log_p") - means(runs, "test", "elbo")


def _parameters(name: str, results: Results) -> str:
    first = next(iter(results["runs"][name].values()))
    return f"{first['guide_parameters']:,}, {first['model_parameters']:,}"


def _members(name: str, results: Results) -> str:
    runs = results["runs"][name].values()
    return ", ".join(str(run["members"]) for run in runs if "members" in run)


def _latency(results: Results, rows: int) -> dict[str, float]:
    """Return the ratios of inference of a batch (the first entry) or of a row (the second)."""
    found = [costs for key, costs in results["inference"].items() if key.startswith("methods")]
    return found[rows]["ratio"]


COLUMNS = {
    "test log p": lambda n, r: spread(means(r["runs"][n], "test", "log_p")),
    "vs VAE": lambda n, r: spread(versus(n, r, "test", "log_p"), sign=True),
    "bits/dim": _bits,
    "ELBO": lambda n, r: spread(means(r["runs"][n], "test", "elbo")),
    "ELBO - log p": lambda n, r: spread(-_missed(n, r), sign=True),
    "train log p": lambda n, r: spread(means(r["runs"][n], "train", "log_p")),
    "ESS": lambda n, r: f"{means(r['runs'][n], 'test', 'ess').mean().item():.0f}",
    "guide, model parameters": _parameters,
    "members": _members,
    "training": lambda n, r: f"{training_ratio(n, r):.2f}",
    "step": lambda n, r: f"{r['steps']['ratio'][n]:.2f}",
    "inference of 100": lambda n, r: f"{_latency(r, 0)[n]:.2f}",
    "of 1": lambda n, r: f"{_latency(r, 1)[n]:.2f}",
}


def plot(results: Results, path: Path) -> None:
    """Draw log p(x) and ELBO of every seed, the gap between them, learning curves, and cost."""
    settings, runs = results["settings"], results["runs"]
    with figure(path, 2, 2, figsize=(15, 11)) as (drawn, ((bounds, gaps), (curves, costs))):
        draw_values(bounds, results, {"o": ("test", "log_p"), "|": ("test", "elbo")})
        title = f"IWAE-{settings['eval_samples']} (dots) and ELBO (bars), by seed"
        bounds.set(xlabel="nats per test image", title=title)
        draw_bars(gaps, {"log p(x) - ELBO": {n: _missed(n, results).mean().item() for n in runs}})
        gaps.set(xlabel="nats per test image", title="what the guide misses")
        draw_learning(curves, results, "IWAE-16")
        training = {name: training_ratio(name, results) for name in runs}
        latency = _latency(results, 0)
        draw_costs(costs, results, BASELINE, training=training, inference=latency)
        drawn.suptitle(f"{settings['dataset']}, {settings['epochs']} epochs, 4 samples per image")
