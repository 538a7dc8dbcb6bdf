"""The main job: one VAE under Trace_ELBO and under each multi-sample bound, on equal budgets.

Every method trains the same Pyro model and guide from the same initial weights, with 64 samples per
datum and step. Each is evaluated on test and training images by log p(x) (IWAE-5000), IWAE-64,
their difference (minus the divergence that the guide leaves) and the effective sample
size; and by the cost of a step, timed side by side.
"""

from collections.abc import Callable, Iterable
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor

from benchmarks.experiment import Experiment, evidence
from benchmarks.report import (
    Results,
    Runs,
    draw_costs,
    draw_learning,
    draw_values,
    figure,
    method_table,
    with_error,
)
from benchmarks.run import Method, Settings, Task, parse, training_parser
from benchmarks.tasks.images import VAE, image_task, sizes
from pyro_recursive import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO

BASELINE = "Trace_ELBO"
PYRO = {"num_particles": 64, "vectorize_particles": True, "max_plate_nesting": 1}


# Every method draws 64 samples per datum and step.
LOSSES: dict[str, Callable[[], ELBO]] = {
    BASELINE: lambda: Trace_ELBO(**PYRO),
    "Pyro RenyiELBO": lambda: RenyiELBO(alpha=0, **PYRO),
    "IWAE": lambda: IWAE_ELBO(64),
    "IWAE dreg": lambda: IWAE_ELBO(64, estimator="dreg"),
    "MIWAE(8,8)": lambda: MIWAE_ELBO(8, 8),
    "PIWAE(8,8)": lambda: PIWAE_ELBO(8, 8),
    "CIWAE 0.5": lambda: CIWAE_ELBO(64, beta=0.5),
    "CIWAE learned": lambda: CIWAE_ELBO(64, learn_beta=True),
}


def method(vae: VAE, task: Task, settings: Settings, make_loss: Callable[[], ELBO]) -> Method:
    return Method(vae, vae.guide, make_loss())


METHODS = {name: partial(method, make_loss=loss) for name, loss in LOSSES.items()}


def main(arguments: list[str]) -> None:
    """Train, evaluate, print the table; write JSON and a plot."""
    options = parse(training_parser("bounds", __doc__, METHODS), arguments)
    epochs = options.epochs or (60 if options.dataset == "digits" else 8)
    settings = Settings.of(options, epochs=epochs, **sizes(options.dataset))
    task = image_task(settings, options, settings.eval_points)
    experiment = Experiment(settings, task, METHODS, options, validation_particles=64)
    experiment.run(evaluate)
    experiment.time()
    experiment.finish(report, plot)


def evaluate(method: Method, task: Task, settings: Settings) -> dict[str, Any]:
    """Return log p(x) and IWAE-64 per image, in nats, the mean ESS of all samples and of 64."""
    found: dict[str, Any] = {
        part: evidence(method, images, settings.eval_samples, few=64)
        for part, images in (("test", task.test), ("train", task.train_sample))
    }
    if isinstance(method.loss, CIWAE_ELBO):
        found["beta"] = float(method.loss.beta)
    return found


# The report.


def report(results: Results) -> str:
    """Return the table of a run: nats per image, ± one standard error over images."""
    return f"{method_table('loss', COLUMNS, results)}\n\n{caption(results)}"


def caption(results: Results) -> str:
    """Return what an error over images leaves out."""
    text = '± (but for columns "by seed") is a standard error over images, of these trained models'
    text += " only: it leaves out the noise of training."
    if results["settings"]["dataset"] == "digits-rotated":
        text += " The four turns of an image are not independent: the error over images is up to"
        text += " two times as large."
    return text


def images_of(name: str, results: Results, *keys: str, seeds: Iterable[str] = ()) -> Tensor:
    """Return the mean of a score of each image over some seeds, all where none are given."""
    runs = results["runs"][name]
    chosen = [runs[seed] for seed in seeds] or runs.values()
    return torch.tensor([reduce(getitem, keys, run) for run in chosen]).mean(0)


def _beta(name: str, results: Results) -> str:
    betas = [run["beta"] for run in results["runs"][name].values() if "beta" in run]
    return f"{sum(betas) / len(betas):.2f}" if betas else ""


def versus_baseline(name: str, results: Results, *keys: str, digits: int = 2) -> str:
    """Return the difference of a score of each image to the baseline's, of the seeds of both."""
    runs = results["runs"]
    seeds = [seed for seed in runs[name] if seed in runs.get(BASELINE, {})]
    if not seeds:
        return ""
    mine, base = (images_of(n, results, *keys, seeds=seeds) for n in (name, BASELINE))
    return with_error(mine - base, sign=True, digits=digits)


def _gap(name: str, results: Results) -> str:
    tight, log_p = (images_of(name, results, "test", key) for key in ("iwae_64", "log_p"))
    return with_error(tight - log_p, sign=True)


COLUMNS = {
    "beta": _beta,
    "test log p": lambda n, r: with_error(images_of(n, r, "test", "log_p")),
    "vs Trace_ELBO": lambda n, r: versus_baseline(n, r, "test", "log_p"),
    "test IWAE-64": lambda n, r: with_error(images_of(n, r, "test", "iwae_64")),
    "gap (-KL)": _gap,
    "train log p": lambda n, r: with_error(images_of(n, r, "train", "log_p")),
    "ESS of 64": lambda n, r: f"{images_of(n, r, 'test', 'ess_64').item():.1f}",
    "ms/step": lambda n, r: f"{r['steps']['ms'][n]:.1f}",
    "ratio": lambda n, r: f"{r['steps']['ratio'][n]:.2f}",
}


def plot(results: Results, path: Path) -> None:
    """Draw learning curves, the final log p(x) with IWAE-64, and cost."""
    with figure(path, 1, 3, 120, figsize=(15, 4.5)) as (drawn, axes):
        curves, final, cost = axes[0]
        draw_bounds(curves, final, results)
        draw_costs(cost, results, BASELINE)
        drawn.suptitle(f"{results['settings']['dataset']}: training with 64 samples per image")


def draw_bounds(curves: Any, final: Any, results: Results) -> None:
    """Draw learning curves, those of runs in progress too, and the final log p(x) with IWAE-64."""
    trained = {
        name: found
        for name in [*results["runs"], *results["unfinished"]]
        if (found := _trained(results["runs"], name) | _trained(results["unfinished"], name))
    }
    draw_learning(curves, {"runs": trained}, "IWAE-64")
    draw_values(final, results, {"o": ("test", "log_p"), "|": ("test", "iwae_64")})
    title = f"IWAE-{results['settings']['eval_samples']} (dot) and IWAE-64 (bar)"
    final.set(xlabel="nats per test image", title=title)


def _trained(methods: dict[str, Runs], name: str) -> Runs:
    """Return the runs of a method that have finished an epoch."""
    runs = methods.get(name, {}).items()
    return {seed: run for seed, run in runs if run.get("history", {}).get("epoch")}
