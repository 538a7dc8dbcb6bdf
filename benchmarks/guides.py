"""The benchmark of guides: one VAE with each kind of posterior, on equal budgets.

Every method trains the same decoder from the same initial weights, with 4 samples per image and
step. Each is evaluated on test and training images by log p(x) (IWAE-5000), also in bits per
dimension, and by the ELBO, whose distance from it is the divergence that the guide leaves; and by
the number of parameters, the cost of training and the latency of inference, timed side by side.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
from torch import Tensor

from benchmarks.methods.guides import BASELINE, METHODS, Setup, build, mixture
from benchmarks.report import (
    Results,
    draw_learning,
    draw_ratios,
    draw_values,
    figure,
    means,
    method_table,
    name_rows,
    ratio,
    spread,
    table,
    training_ratio,
    versus,
)
from benchmarks.run import (
    Experiment,
    Method,
    Settings,
    Task,
    count,
    elbo_of,
    evidence,
    parse,
    time_steps,
    training_parser,
)
from benchmarks.tasks.images import image_task, sizes
from benchmarks.timing import time_inference
from pyro_recursive.datasets import fixed_binarize

PIXELS = {"digits": 64}  # 784 elsewhere


@dataclass(frozen=True)
class GuideSettings(Settings):
    """What determines a result, beside method and seed."""

    pseudo_inputs: int
    train_points: int
    elbo_samples: int


def main(arguments: list[str]) -> None:
    """Train, evaluate, print the table; write JSON and a plot."""
    options = parse_options(arguments)
    small = options.dataset == "digits"
    settings = GuideSettings.of(
        options,
        epochs=options.epochs or (60 if small else 8),
        pseudo_inputs=100 if small else 200,
        elbo_samples=min(100, options.eval_samples),
        **sizes(options.dataset),
    )
    task = image_task(settings, options, settings.train_points)
    experiment = Experiment(settings, task, options)
    experiment.merge(options.merge)
    _time({"runs": {}}, settings, task, repeats=1)  # what the first step of a process sets up
    results = experiment.run(
        lambda name: build(name, _setup(settings, task)),
        lambda method: _evaluate(method, settings, task),
        options.methods,
        options.seeds,
    )
    experiment.sort(METHODS)
    _time(results, settings, task, options.timing_repeats)
    experiment.finish(report, plot)


def parse_options(arguments: list[str]) -> Any:
    """Return the options; a smoke run has its own."""
    parser = training_parser("guides", __doc__, METHODS)
    parser.add_argument("--train-points", type=int, default=100, help="training images")
    parser.add_argument("--merge", nargs="+", default=[], help="take in other results.json, too")
    smoke = {"epochs": 1, "eval_points": 20, "train_points": 20}
    return parse(parser, arguments, **smoke, eval_samples=100, timing_repeats=1)


def _setup(settings: GuideSettings, task: Task, name: str = "") -> Setup:
    return Setup(
        make_vae=task.make_vae,
        images=task.train,
        holdout=task.validation[:100],
        hidden=settings.hidden,
        latent=settings.latent,
        steps=settings.steps(len(task.train)),
        pseudo_inputs=settings.pseudo_inputs,
        name=name,
    )


def _evaluate(method: Method, settings: GuideSettings, task: Task) -> dict[str, Any]:
    """Return scores and sizes; parameters that guide and prior share count as the guide's."""
    assert task.train_sample is not None
    guide, every = count(method.guide), count(*method.modules())
    found: dict[str, Any] = {"guide_parameters": guide, "model_parameters": every - guide}
    if hasattr(method.guide, "stage"):
        found["members"] = len(method.guide.members)
        found["stage"] = method.guide.stage.kind
    for split, images in (("test", task.test), ("train", task.train_sample)):
        found[split] = _scores(method, images, settings)
    return found


def _scores(method: Method, images: Tensor, settings: GuideSettings) -> dict[str, Any]:
    """Return log p(x) and ELBO per image, in nats, and the mean effective sample size."""
    pyro.set_rng_seed(64)
    model, guide = method.vae.model, method.guide
    log_p, ess = evidence(model, guide, images, settings.eval_samples)
    elbo = elbo_of(model, guide, images, settings.elbo_samples)
    return {"log_p": log_p, "elbo": elbo, "ess": ess.mean().item()}


def _time(results: Results, settings: GuideSettings, task: Task, repeats: int) -> None:
    """Time steps and inference of the methods that have runs, and of mixtures of 1 to 4."""
    pyro.clear_param_store()
    batch = fixed_binarize(task.train[: settings.batch_size], seed=0)
    names = dict.fromkeys([BASELINE, *results["runs"]])
    methods = {name: build(name, _setup(settings, task, name)) for name in names}
    results["steps"] = time_steps(methods, batch, repeats, BASELINE)
    mixtures = {
        f"{number} {kind}": mixture(
            _setup(settings, task, f"{number} {kind}"), number, kind == "shared trunk"
        )
        for kind in ("encoders", "shared trunk")
        for number in (1, 2, 3, 4)
    }
    guides = {name: method.guide for name, method in methods.items()}
    results["inference"] = time_inference(guides, batch, repeats, BASELINE, "methods")
    results["inference"] |= time_inference(mixtures, batch, repeats, "1 encoders", "mixtures")


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
    pixels = PIXELS.get(results["settings"]["dataset"], 784)
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
    "vs VAE": lambda n, r: spread(versus(n, r, BASELINE, "test", "log_p"), sign=True),
    "bits/dim": _bits,
    "ELBO": lambda n, r: spread(means(r["runs"][n], "test", "elbo")),
    "ELBO - log p": lambda n, r: spread(-_missed(n, r), sign=True),
    "train log p": lambda n, r: spread(means(r["runs"][n], "train", "log_p")),
    "ESS": lambda n, r: f"{means(r['runs'][n], 'test', 'ess').mean().item():.0f}",
    "guide, model parameters": _parameters,
    "members": _members,
    "training": lambda n, r: ratio(training_ratio(n, r, BASELINE)),
    "step": lambda n, r: f"{r['steps']['ratio'][n]:.2f}",
    "inference of 100": lambda n, r: f"{_latency(r, 0)[n]:.2f}",
    "of 1": lambda n, r: f"{_latency(r, 1)[n]:.2f}",
}


def plot(results: Results, path: Path) -> None:
    """Draw log p(x) and ELBO of every seed, the gap between them, learning curves, and cost."""
    settings, names = results["settings"], list(results["runs"])
    with figure(path, 2, 2, figsize=(15, 11)) as (drawn, ((bounds, gaps), (curves, costs))):
        draw_values(bounds, results, {"o": ("test", "log_p"), "|": ("test", "elbo")})
        title = f"IWAE-{settings['eval_samples']} (dots) and ELBO (bars), by seed"
        bounds.set(xlabel="nats per test image", title=title)
        for number, name in enumerate(names):
            gap = _missed(name, results)
            error = gap.std().item() if len(gap) > 1 else 0.0
            gaps.barh(number, gap.mean().item(), xerr=error, color=f"C{number % 10}")
        name_rows(gaps, names)
        gaps.set(xlabel="nats per test image", title="log p(x) - ELBO: what the guide misses")
        draw_learning(curves, results, "IWAE-16")
        training = {name: training_ratio(name, results, BASELINE) for name in names}
        step = results["steps"]["ratio"]
        kinds = {"training": training, "a step of all components": step}
        draw_ratios(costs, names, kinds | {"inference": _latency(results, 0)})
        costs.set(xlabel="time / VAE", title="cost, equal samples")
        drawn.suptitle(f"{settings['dataset']}, {settings['epochs']} epochs, 4 samples per image")
