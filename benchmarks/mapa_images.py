"""MAPA on binary images, beside the autoencoder that it starts from, the VAE and the IWAE.

Images are binarised once: the data have to be the same in each epoch, as their codes are. All
methods have the same decoder (tanh networks with two hidden layers, Bernoulli pixels), the same
initial weights of it for a seed, minibatches and steps of Adam. "MAPA 5" sums a row's nearest code
and draws 5 others, independently, as the paper (arXiv 2403.08941, Eq. 10); "pooled S" shares what
is summed and drawn among the rows of a minibatch; "AE" sums the nearest, which is the row's own.
All MAPA methods are autoencoders for the first tenth of the epochs.

Scores are log p(x) in nats per image, of the same images for all:

- codes: the sum over the codes of all training images, exactly. With a discrete prior this is a
  model as any other, but the codes of training images are among those of its prior, and on these
  images log p(x) is optimistic: an autoencoder that repeats its input has nearly -log N.
- continuous: with the standard normal prior, or for MAPA with normals around the codes
  (`recover_prior`, kind "kde"). For two latents by quadrature on a grid (``grid_error``: the
  largest difference, of an image, from a grid with half the points an axis).
- sampled: the same by importance sampling, from the guide; for MAPA (beyond two latents only, the
  test images only) from a guide whose codes have about the width of the recovered prior's normals.
  In expectation it is a lower bound, and a loose one where the effective sample size (ESS) is
  small. Each draw of MAPA's takes the density of a normal for each code, and by default it has a
  fifth of the draws: where scores are sampled, that is to the disadvantage of MAPA.

Decoder passes count different codes for each image of a minibatch, after the first tenth; an IWAE's
are its samples. Seconds are of training alone, and the table's are told once; run one thread
(OMP_NUM_THREADS=1), or processor seconds are the sum over threads.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import torch
from tqdm import tqdm

from benchmarks.mapa_images_report import picture_path, plot, report
from benchmarks.methods.mapa import (
    AUTOENCODER,
    BASELINE,
    Diverged,
    Empirical,
    Learner,
    Method,
    Training,
    build,
    independent,
    pooled,
    train,
)
from benchmarks.report import finish, hardware, write_json
from benchmarks.run import Settings, parse, stored, training_parser
from benchmarks.tasks.code_images import GRID_LATENTS, ImageData, score
from benchmarks.tasks.images import image_task, sizes
from pyro_recursive.datasets import load
from pyro_recursive.mapa import recover_prior

NEIGHBOURS = 64  # that a row of the table keeps
SHOWN = 36  # samples of a picture

METHODS: dict[str, Method] = {
    BASELINE: Method(1),
    "IWAE 5": Method(5),
    "AE": AUTOENCODER,
    "MAPA 5": independent(5),
    **{f"pooled {s}": pooled(s) for s in (1, 5)},
}


@dataclass(frozen=True)
class ImageSettings(Settings):
    """What determines a result, beside its latents, method and seed."""

    train_points: int | None
    rate: float
    recovered_samples: int  # for models with a recovered prior
    nodes: int  # of an axis of the grid


def main(arguments: list[str]) -> None:
    """Run what is missing, print tables, write JSON and a picture."""
    options = parse_options(arguments)
    widths = sizes(options.dataset) | {"latent": 0}  # which --latents has
    epochs = options.epochs or (60 if options.dataset == "digits" else 10)
    settings, folder = ImageSettings.of(options, epochs=epochs, **widths), Path(options.output)
    data = image_data(settings, options)
    results = stored(folder, asdict(settings), options.resume, "runs")
    results["hardware"] = hardware()
    for seed, latents, name in tqdm(
        list(product(options.seeds, options.latents, options.methods)), desc="runs"
    ):
        found = results["runs"].setdefault(str(latents), {}).setdefault(name, {})
        if str(seed) not in found:
            data.latents = latents
            with pyro.validation_enabled(False):
                found[str(seed)] = _run(name, seed, settings, data, folder)
            results["table_seconds"] = data.table_seconds or results.get("table_seconds")
            write_json(folder / "results.json", results)
    finish(results, folder / "results.json", report(results), plot(results, folder))


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Return the options; a smoke run has its own."""
    parser = training_parser("mapa-images", __doc__, METHODS)
    parser.set_defaults(eval_points=500, seeds=[0, 1, 2])
    parser.add_argument("--latents", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--train-points", type=int, help="default: all that are not held out")
    parser.add_argument("--rate", type=float, default=3e-3, help="of Adam; it falls to 0")
    parser.add_argument("--nodes", type=int, default=300, help="points of an axis of the grid")
    parser.add_argument("--recovered-samples", type=int, default=1000, help="with recovered priors")
    smoke = {"epochs": 2, "seeds": [0], "train_points": 150, "eval_points": 20, "eval_samples": 50}
    options = parse(parser, arguments, **smoke, nodes=40, recovered_samples=20)
    if options.epochs is not None and options.epochs < 2:
        parser.error(f"--epochs must be at least 2, one of them to warm up; got {options.epochs}")
    return options


def image_data(settings: ImageSettings, options: argparse.Namespace) -> ImageData:
    """Binarise all images once: codes belong to data that are the same in each epoch."""
    found = load(settings.dataset, download=options.download)
    task = image_task(settings, options, settings.train_points or len(found.train))
    assert task.train_sample is not None
    labels = found.train_labels[: len(task.train_sample)]
    return ImageData(task.train_sample, task.test, labels, settings.hidden)


def learner_of(name: str, data: ImageData, seed: int) -> Learner:
    """Return a method with the initial networks of a seed."""
    return build(METHODS[name], data, seed, NEIGHBOURS, estimator="dreg")


def _run(
    name: str, seed: int, settings: ImageSettings, data: ImageData, folder: Path
) -> dict[str, Any]:
    """Train and evaluate a method, and keep what is to be drawn."""
    learner = learner_of(name, data, seed)
    training = Training(settings.epochs, settings.batch_size, settings.rate)
    try:
        cost = asdict(train(learner, training, seed))
    except Diverged as error:
        return {"failure": str(error)}
    steps = settings.steps(len(data.train))
    cost["ms_per_step"] = 1000 * cost["processor_seconds"] / steps
    pyro.set_rng_seed(seed + 1000)
    start = time.perf_counter()
    try:
        found = score(learner, settings.nodes, settings.eval_samples, settings.recovered_samples)
        if data.latents == GRID_LATENTS:
            _keep_picture(learner, picture_path(folder, name, data.latents, seed))
    except ValueError as error:  # of codes that no continuous prior can be recovered from
        return {**cost, "failure": str(error)}
    return {**cost, **found, "scoring_seconds": time.perf_counter() - start}


@torch.no_grad()
def _keep_picture(learner: Learner, path: Path) -> None:
    """Keep the codes, and means of images that the continuous model draws."""
    codes = learner.codes()
    if isinstance(learner, Empirical):
        z = recover_prior(codes, "kde", held_out=0)().sample((SHOWN,))
    else:
        z = torch.randn(SHOWN, learner.data.latents)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"codes": codes, "labels": learner.data.labels, "samples": learner.decoder(z).sigmoid()}
    torch.save(kept, path)
