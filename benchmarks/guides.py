"""The benchmark of guides: one VAE with each kind of posterior, on equal budgets.

Every method trains the same decoder from the same initial weights, with 4 samples per image and
step. Each is judged by what it learned, on test and training images: log p(x) by IWAE-5000, also in
bits per dimension, and the ELBO, whose distance from it is the divergence that the guide leaves.
Beside that: parameters, the cost of training and the latency of inference, timed side by side.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.experiment import (
    EPOCHS,
    OPTIMIZER,
    Data,
    binarized,
    check_settings,
    elbo_of,
    held_out,
    parser_of,
    sizes,
    stored,
)
from benchmarks.guide_costs import time_inference, time_steps
from benchmarks.guide_methods import METHODS, Method, Setup, build, count
from benchmarks.guide_report import plot, report
from benchmarks.report import hardware, write_json
from pyro_recursive import IWAE_ELBO, fit, log_marginal
from pyro_recursive.datasets import dynamic_binarize, fixed_binarize, load
from pyro_recursive.training.nan_search import NonFiniteError


@dataclass(frozen=True)
class Settings:
    """What determines a result, beside its seed; a run can be resumed only with the same."""

    dataset: str
    epochs: int
    batch_size: int
    hidden: int
    latent: int
    pseudo_inputs: int
    eval_points: int
    train_points: int
    eval_samples: int
    elbo_samples: int


def main(arguments: list[str]) -> None:
    """Train, evaluate, print the table; write JSON and a plot."""
    options = parse(arguments)
    settings, folder = _settings(options), Path(options.output)
    images = load(settings.dataset, download=options.download)
    rows = held_out(settings.dataset)
    data = binarized(images, rows, settings.eval_points, settings.train_points)
    results = stored(folder, asdict(settings), options.resume, "runs")
    _merge(results, options.merge)
    _time({"runs": {}}, settings, data, repeats=1)  # what the first step of a process sets up
    pairs = [(name, seed) for seed in options.seeds for name in options.methods]
    for name, seed in tqdm(pairs, desc="runs"):
        runs = results["runs"].setdefault(name, {})
        failures = results.setdefault("diverged", {}).setdefault(name, {})
        if str(seed) not in runs | failures:
            try:
                runs[str(seed)] = _run(name, seed, settings, data, folder, options.resume)
            except NonFiniteError as error:  # a result, too
                failures[str(seed)] = str(error)
            write_json(folder / "results.json", results)
    for key in ("runs", "diverged"):
        results[key] = {name: results[key][name] for name in METHODS if results[key].get(name)}
    _time(results, settings, data, options.timing_repeats)
    write_json(folder / "results.json", results)
    print(f"\n{report(results)}\n")
    plot(results, folder / "results.png")
    print(f"Wrote {folder / 'results.json'} and {folder / 'results.png'}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; a smoke run has its own."""
    parser = parser_of("guides", __doc__, METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--train-points", type=int, default=100, help="training images")
    parser.add_argument("--merge", nargs="+", default=[], help="take in other results.json, too")
    options = parser.parse_args(arguments)
    kind = "guides-smoke" if options.smoke else "guides"
    options.output = options.output or f"runs/{kind}-{options.dataset}"
    if options.smoke:
        options.epochs, options.eval_points, options.train_points = 1, 20, 20
        options.eval_samples, options.timing_repeats = 100, 1
    return options


def _settings(options: argparse.Namespace) -> Settings:
    small = options.dataset == "digits"
    return Settings(
        dataset=options.dataset,
        epochs=options.epochs or EPOCHS.get(options.dataset, 8),
        batch_size=options.batch_size,
        **sizes(options.dataset),
        pseudo_inputs=100 if small else 200,
        eval_points=options.eval_points,
        train_points=options.train_points,
        eval_samples=options.eval_samples,
        elbo_samples=min(100, options.eval_samples),
    )


def _merge(results: dict[str, Any], paths: list[str]) -> None:
    """Take in the runs of other files with the same settings."""
    for path in paths:
        other = json.loads(Path(path).read_text())
        check_settings(Path(path), other["settings"], results["settings"])
        for key in ("runs", "diverged"):
            for name, runs in other.get(key, {}).items():
                known = results.setdefault(key, {})
                known[name] = runs | known.get(name, {})


def _setup(settings: Settings, data: Data, name: str = "") -> Setup:
    return Setup(
        images=data.train,
        holdout=data.validation[:100],
        hidden=settings.hidden,
        latent=settings.latent,
        steps=settings.epochs * -(-len(data.train) // settings.batch_size),
        pseudo_inputs=settings.pseudo_inputs,
        name=name,
    )


def _run(
    name: str, seed: int, settings: Settings, data: Data, folder: Path, resume: bool
) -> dict[str, Any]:
    """Train and evaluate one method with one seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    method = build(name, _setup(settings, data))
    method.guide.prepare(data.validation[:2])  # a checkpoint finds all parameters in place
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name.replace(' ', '-')}-{seed}.pt"
    begun, start = resume and checkpoint.exists(), time.process_time()
    history = fit(
        method.vae.model,
        method.guide,
        data.train,
        loss=method.loss,
        epochs=settings.epochs,
        optimizer=OPTIMIZER,
        batch_size=settings.batch_size,
        transform=dynamic_binarize,
        validation=data.validation,
        validation_loss=IWAE_ELBO(16),
        checkpoint=checkpoint,
        resume=resume,
        seed=seed,
    )
    result = _describe(method) | {"history": asdict(history)}
    if not begun:  # else the time before the interrupt is not known
        result["processor_seconds"] = time.process_time() - start
    result["test"] = _evaluate(method, data.test_binary, settings)
    result["train"] = _evaluate(method, data.train_binary, settings)
    return result


def _describe(method: Method) -> dict[str, Any]:
    """Return the sizes of what was trained; what guide and prior share counts as the guide's."""
    guide, every = count(method.guide), count(*method.modules())
    result: dict[str, Any] = {"guide_parameters": guide, "model_parameters": every - guide}
    if hasattr(method.guide, "stage"):
        result["members"] = len(method.guide.members)
        result["stage"] = method.guide.stage.kind
    return result


def _evaluate(method: Method, images: Tensor, settings: Settings) -> dict[str, Any]:
    """Return log p(x) and ELBO per image, in nats, and the mean effective sample size."""
    pyro.set_rng_seed(64)
    model, guide, draws = method.vae.model, method.guide, settings.elbo_samples
    evidence, elbo, ess = [], [], []
    for batch in tqdm(images.split(100), desc="log p(x)", leave=False):
        found = log_marginal(
            model, guide, batch, num_particles=settings.eval_samples, diagnostics=True
        )
        evidence.append(found.log_marginal)
        ess.append(found.ess)
        elbo.append(elbo_of(model, guide, batch, draws))
    return {
        "log_p": torch.cat(evidence).tolist(),
        "elbo": torch.cat(elbo).tolist(),
        "ess": torch.cat(ess).mean().item(),
    }


def _time(results: dict[str, Any], settings: Settings, data: Data, repeats: int) -> None:
    """Time steps and inference of the methods that have runs."""
    batch = fixed_binarize(data.train[: settings.batch_size], seed=0)
    setup = partial(_setup, settings, data)
    names = list(results["runs"])
    results["steps"] = time_steps(names, setup, batch, OPTIMIZER, repeats)
    results["inference"] = time_inference(names, setup, batch, repeats)
    results["hardware"] = hardware()
