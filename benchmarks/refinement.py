"""The benchmark of refinement: amortised, semi-amortised and free inference of one VAE.

On images; and on synthetic sequences, with a decoder to learn ("sequences") or with the true one,
for inference alone ("sequences-known"). Each method is judged by what it learned, on test rows:
log p(x) by IWAE-5000, the ELBO, and the divergence between them in two parts, the approximation and
the amortisation gap; by what the latents carry, KL, mutual information and active units; and by
what it costs: training, a step, and inference for a row.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.experiment import (
    OPTIMIZER,
    binarized,
    elbo_of,
    held_out,
    parser_of,
    sizes,
    stored,
)
from benchmarks.guide_costs import costs_of, grow, infer, step_of
from benchmarks.refinement_methods import BASELINE, METHODS, Method, Setup, build
from benchmarks.refinement_report import plot, report
from benchmarks.report import hardware, write_json
from benchmarks.sequence_vae import SequenceVAE
from benchmarks.vae import VAE
from pyro_recursive import IWAE_ELBO, fit, gaps, log_marginal
from pyro_recursive.datasets import (
    dynamic_binarize,
    fixed_binarize,
    load,
    lstm_sequences,
    sequence_evidence,
)
from pyro_recursive.evaluation.information import active_units, rate_of
from pyro_recursive.evaluation.search import Search
from pyro_recursive.training.nan_search import NonFiniteError

EPOCHS = {"digits": 60, "sequences": 6, "sequences-known": 6}  # 5 elsewhere
SEQUENCES = ("sequences", "sequences-known")
VOCABULARY = 200  # a fifth of the default, and half of its hidden units: minutes, not hours
ROWS = 25_000  # of 5,000 sequences, a decoder soon knows each by heart
VALIDATION_ROWS = 400
NODES = 61  # an error of about 0.002 nats


@dataclass(frozen=True)
class Settings:
    """What determines a result, beside its seed; a run can be resumed only with the same."""

    dataset: str
    epochs: int
    batch_size: int
    hidden: int
    latent: int
    refinements: int
    eval_points: int
    gap_points: int
    eval_samples: int


@dataclass(frozen=True)
class Task:
    """Rows to train on and to evaluate on, and how a VAE for them is made."""

    train: Tensor
    validation: Tensor
    test: Tensor
    make_vae: Callable[[str], Any]
    transform: Callable | None = None
    exact: Tensor | None = None  # log p(x) of the test rows under the true model, where known


def main(arguments: list[str]) -> None:
    """Train, evaluate, print the table; write JSON and a plot."""
    options = parse(arguments)
    settings, folder = _settings(options), Path(options.output)
    task = _task(settings, options.download)
    results = stored(folder, asdict(settings), options.resume, "runs")
    if task.exact is not None:
        results["true model"] = task.exact.mean().item()
    pairs = [(name, seed) for seed in options.seeds for name in options.methods]
    for name, seed in tqdm(pairs, desc="runs"):
        runs = results["runs"].setdefault(name, {})
        failures = results.setdefault("diverged", {}).setdefault(name, {})
        if "log_p" not in runs.get(str(seed), {}) and str(seed) not in failures:
            try:
                known = runs.setdefault(str(seed), {})
                method = _trained(name, seed, settings, task, folder, options.resume, known)
                write_json(folder / "results.json", results)
                known.update(_evaluate(method, task.test, settings))
            except NonFiniteError as error:  # a result, too
                failures[str(seed)] = str(error)
                del runs[str(seed)]
            write_json(folder / "results.json", results)
    for key in ("runs", "diverged"):
        results[key] = {name: results[key][name] for name in METHODS if results[key].get(name)}
    _time(results, settings, task, options.timing_repeats)
    write_json(folder / "results.json", results)
    print(f"\n{report(results)}\n")
    plot(results, folder / "results.png")
    print(f"Wrote {folder / 'results.json'} and {folder / 'results.png'}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; a smoke run has its own."""
    parser = parser_of("refinement", __doc__, METHODS, more_data=SEQUENCES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--refinements", type=int, default=10, help="steps of each refinement")
    parser.add_argument("--gap-points", type=int, default=100, help="rows to measure gaps on")
    options = parser.parse_args(arguments)
    if options.dataset == "sequences-known":  # no steps of the model to hold back
        options.methods = [name for name in options.methods if name != "aggressive"]
    kind = "refinement-smoke" if options.smoke else "refinement"
    options.output = options.output or f"runs/{kind}-{options.dataset}"
    if options.smoke:
        options.epochs, options.eval_points, options.gap_points = 1, 20, 10
        options.eval_samples, options.timing_repeats = 100, 1
    return options


def _settings(options: argparse.Namespace) -> Settings:
    sequences = options.dataset in SEQUENCES
    return Settings(
        dataset=options.dataset,
        epochs=options.epochs or EPOCHS.get(options.dataset, 5),
        batch_size=options.batch_size,
        **({"hidden": 50, "latent": 2} if sequences else sizes(options.dataset)),
        refinements=options.refinements,
        eval_points=options.eval_points,
        gap_points=options.gap_points,
        eval_samples=options.eval_samples,
    )


def _task(settings: Settings, download: bool) -> Task:
    if settings.dataset in SEQUENCES:
        return _sequences(settings)
    images = load(settings.dataset, download=download)
    data = binarized(images, held_out(settings.dataset), settings.eval_points, 1)

    def make_vae(name: str) -> VAE:
        return VAE(data.train.mean(0), settings.hidden, settings.latent, name=name)

    return Task(data.train, data.validation, data.test_binary, make_vae, dynamic_binarize)


def _sequences(settings: Settings) -> Task:
    data = lstm_sequences(
        VALIDATION_ROWS + ROWS,
        test_rows=settings.eval_points,
        vocabulary=VOCABULARY,
        hidden=settings.hidden,
    )

    def make_vae(name: str) -> SequenceVAE:
        vae = SequenceVAE(data.vocabulary, settings.hidden, settings.latent, name=name)
        if settings.dataset == "sequences-known":
            vae.decoder = data.decoder
        return vae

    exact = sequence_evidence(data.decoder, data.test, nodes=NODES)
    validation, train = data.train.split([VALIDATION_ROWS, ROWS])
    return Task(train, validation, data.test, make_vae, exact=exact)


def _setup(settings: Settings, task: Task, name: str = "") -> Setup:
    return Setup(
        make_vae=task.make_vae,
        holdout=task.validation[:100],
        latent=settings.latent,
        hidden=settings.hidden,
        updates=settings.epochs * -(-len(task.train) // settings.batch_size),
        refinements=settings.refinements,
        name=name,
    )


def _trained(
    name: str,
    seed: int,
    settings: Settings,
    task: Task,
    folder: Path,
    resume: bool,
    known: Any,
) -> Method:
    """Train one method with one seed, and note how that went."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    method = build(name, _setup(settings, task))
    method.guide.prepare(task.validation[:2])  # a checkpoint finds all parameters in place
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name.replace(' ', '-')}-{seed}.pt"
    begun, start = resume and checkpoint.exists(), time.process_time()
    history = fit(
        method.vae.model,
        method.guide,
        task.train,
        loss=method.loss,
        epochs=settings.epochs,
        optimizer=OPTIMIZER,
        batch_size=settings.batch_size,
        transform=task.transform,
        validation=task.validation,
        validation_loss=IWAE_ELBO(16),
        aggressive=method.aggressive,
        checkpoint=checkpoint,
        resume=resume,
        seed=seed,
    )
    known["history"] = asdict(history)
    if not begun:  # else the time before the interrupt is not known
        known["processor_seconds"] = time.process_time() - start
    return method


def _evaluate(method: Method, rows: Tensor, settings: Settings) -> dict[str, Any]:
    """Return what the method learned, in nats: lists are over rows."""
    pyro.set_rng_seed(64)
    model, guide = method.vae.model, method.guide
    samples = settings.eval_samples
    log_p = [
        log_marginal(model, guide, batch, num_particles=samples)
        for batch in tqdm(rows.split(100), desc="log p(x)", leave=False)
    ]
    elbo = [elbo_of(model, guide, batch, min(100, samples)) for batch in rows.split(100)]
    rate = rate_of(model, guide, rows)
    units = active_units(guide, rows)
    result: dict[str, Any] = {
        "log_p": torch.cat(log_p).tolist(),
        "elbo": torch.cat(elbo).tolist(),
        "kl": rate.kl.item(),
        "mutual_information": rate.mutual_information.item(),
        "active_units": units.number,
    }
    search = Search(draws=10, steps=min(1000, samples), window=50, patience=3)
    gap_rows = rows[: settings.gap_points]
    found = gaps(model, guide, gap_rows, num_particles=samples, search=search)
    names = ("log_marginal", "elbo", "best", "start")
    values = {name: getattr(found, name) for name in names}
    result["gaps"] = {n: v.tolist() for n, v in values.items() if v is not None}
    return result


def _time(results: dict[str, Any], settings: Settings, task: Task, repeats: int) -> None:
    """Time a step of training and the inference of a batch and of a row, side by side."""
    pyro.clear_param_store()
    batch = task.train[: settings.batch_size]
    if task.transform is not None:
        batch = fixed_binarize(batch, seed=0)
    names = list(dict.fromkeys([BASELINE, *results["runs"]]))
    methods = {name: build(name, _setup(settings, task, name)) for name in names}
    for method in methods.values():
        grow(method.guide, batch)
    steps = {name: step_of(method, batch, OPTIMIZER) for name, method in methods.items()}
    results["steps"] = costs_of(steps, repeats, calls=2, baseline=BASELINE)
    results["inference"] = {
        f"{rows} rows": costs_of(
            {name: partial(infer, method.guide, batch[:rows]) for name, method in methods.items()},
            repeats,
            calls=5,
            baseline=BASELINE,
        )
        for rows in (len(batch), 1)
    }
    results["hardware"] = hardware()
