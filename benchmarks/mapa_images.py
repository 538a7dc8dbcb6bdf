"""MAPA on binary images, beside the autoencoder that it starts from, the VAE and the IWAE.

Images are binarised once: the data have to be the same in each epoch, as their codes are. All
methods have the same decoder (tanh networks with two hidden layers, Bernoulli pixels), the same
initial weights of it for a seed, minibatches and steps of Adam. "MAPA 5" sums a row's nearest code
and draws 5 others, independently, as the paper (arXiv 2403.08941, Eq. 10); "pooled S" shares what
is summed and drawn among the rows of a minibatch; "AE" sums the nearest, which is the row's own;
"exact sum", not among the default methods, sums all codes: with 10,000 images it takes gigabytes.
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
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.methods.mapa import (
    AUTOENCODER,
    Diverged,
    Empirical,
    Learner,
    Method,
    build,
    independent,
    pooled,
    train,
)
from benchmarks.report import (
    BASELINE,
    Results,
    Runs,
    figure,
    finish,
    spread,
    table,
    with_error,
    write_json,
)
from benchmarks.run import Settings, parse, stored, training_parser
from benchmarks.tasks.code_images import GRID_LATENTS, ImageData, score
from benchmarks.tasks.images import image_task, sizes
from pyro_recursive.datasets import load
from pyro_recursive.mapa import recover_prior

NEIGHBOURS = 64  # that a row of the table keeps
ALL = 60_000  # codes: as many as there are training images, or more
SHOWN = 36  # samples of a picture

METHODS: dict[str, Method] = {
    BASELINE: Method(1),
    "IWAE 5": Method(5, estimator="dreg"),
    "AE": AUTOENCODER,
    "MAPA 5": independent(5),
    **{f"pooled {s}": pooled(s) for s in (1, 5)},
    "exact sum": pooled(0, top=ALL),
}


@dataclass(frozen=True)
class ImageSettings(Settings):
    """What determines a result, beside its latents, method and seed."""

    train_points: int | None
    recovered_samples: int  # for models with a recovered prior
    rate: float = 3e-3  # of Adam; it falls to 0
    nodes: int = 300  # of an axis of the grid


def main(arguments: list[str]) -> None:
    """Run what is missing, print tables, write JSON and a picture."""
    parser = training_parser("mapa-images", __doc__, METHODS)
    usual = [name for name in METHODS if name != "exact sum"]
    parser.set_defaults(eval_points=500, seeds=[0, 1, 2], methods=usual)
    parser.add_argument("--latents", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--train-points", type=int, help="default: all that are not held out")
    parser.add_argument("--recovered-samples", type=int, default=1000, help="with recovered priors")
    smoke = {"epochs": 2, "seeds": [0], "train_points": 150, "eval_samples": 50}
    options = parse(parser, arguments, **smoke, nodes=40, recovered_samples=20)
    epochs = options.epochs or (60 if options.dataset == "digits" else 10)
    if epochs < 2:
        parser.error(f"--epochs must be at least 2, one of them to warm up; got {epochs}")
    widths = sizes(options.dataset) | {"latent": 0}  # which --latents has
    settings, folder = ImageSettings.of(options, epochs=epochs, **widths), Path(options.output)
    data = image_data(settings, options)
    results = stored(folder, settings.as_json(), options.resume, "runs")
    pictures: dict[str, Picture] = {}
    for seed, latents, name in tqdm(
        list(product(options.seeds, options.latents, options.methods)), desc="runs"
    ):
        found = results["runs"].setdefault(str(latents), {}).setdefault(name, {})
        if str(seed) not in found:
            data.latents = latents
            with pyro.validation_enabled(False):
                found[str(seed)], picture = _run(name, seed, settings, data)
            if picture is not None:
                pictures.setdefault(name, picture)
            results["table_seconds"] = data.table_seconds or results.get("table_seconds")
            write_json(folder / "results.json", results)
    files = [folder / "codes.png"] if pictures else []
    for path in files:
        plot(pictures, path)
    finish(results, folder / "results.json", report(results), files)


def image_data(settings: ImageSettings, options: argparse.Namespace) -> ImageData:
    """Binarise all images once: codes belong to data that are the same in each epoch."""
    found = load(settings.dataset, download=options.download)
    task = image_task(settings, options, settings.train_points or len(found.train))
    labels = found.train_labels[: len(task.train_sample)]
    return ImageData(task.train_sample, task.test, labels, settings.hidden)


def learner_of(name: str, data: ImageData, seed: int) -> Learner:
    """Return a method with the initial networks of a seed."""
    neighbours = ALL if METHODS[name].options.get("top") == ALL else NEIGHBOURS
    return build(METHODS[name], data, seed, neighbours)


Picture = tuple[Tensor, Tensor, Tensor]  # codes, their labels, and samples of images


def _run(
    name: str, seed: int, settings: ImageSettings, data: ImageData
) -> tuple[dict[str, Any], Picture | None]:
    """Train and evaluate a method; return what is to be drawn, too, for two latents."""
    learner = learner_of(name, data, seed)
    try:
        cost = train(learner, seed, settings.epochs, settings.batch_size, settings.rate)
    except Diverged as error:
        return {"failure": str(error)}, None
    steps = settings.steps(len(data.train))
    cost["ms_per_step"] = 1000 * cost["processor_seconds"] / steps
    pyro.set_rng_seed(seed + 1000)
    start = time.perf_counter()
    try:
        found = score(learner, settings.nodes, settings.eval_samples, settings.recovered_samples)
        picture = _picture(learner) if data.latents == GRID_LATENTS else None
    except ValueError as error:  # of codes that no continuous prior can be recovered from
        return {**cost, "failure": str(error)}, None
    return {**cost, **found, "scoring_seconds": time.perf_counter() - start}, picture


@torch.no_grad()
def _picture(learner: Learner) -> Picture:
    """Return codes, labels, and means of images that the continuous model draws."""
    codes = learner.codes()
    if isinstance(learner, Empirical):
        z = recover_prior(codes, "kde", held_out=0)().sample((SHOWN,))
    else:
        z = torch.randn(SHOWN, learner.data.latents)
    return codes, learner.data.labels, learner.decoder(z).sigmoid()


# The report.

TRAIN = ("train_codes", "train_continuous", "train_sampled")  # the first that there is
LARGEST_GRID_ERROR = 0.05  # nats, that are not worth telling


def report(results: Results) -> str:
    """Return a table for each number of latents: nats per image, ± a standard error over images.

    Numbers are means over seeds; differences to the VAE are of the same images and seeds, and in
    brackets is their standard deviation over seeds. "train log p" is that of the codes, of the VAE
    and IWAE that of the continuous prior. ESS: the median over images, of so many draws.
    """
    parts = [
        _of_latents(int(latents), methods, results["settings"]["dataset"])
        for latents, methods in results["runs"].items()
    ]
    seconds = results.get("table_seconds")
    if seconds is not None:
        parts.append(f"The table of neighbours took {seconds:.1f} s, once for all methods.")
    return "\n\n".join(parts)


def _of_latents(latents: int, methods: dict[str, Runs], dataset: str) -> str:
    seeds = max(len(runs) for runs in methods.values())
    rows = [[name, *(cell(name, methods) for _, cell in COLUMNS)] for name in methods]
    header = ["method", *(title for title, _ in COLUMNS)]
    lines = [f"{dataset}, {latents} latents, {seeds} seeds", table(header, rows)]
    for name, runs in methods.items():
        for seed, run in runs.items():
            if "failure" in run:
                lines.append(f"{name}, seed {seed}: {run['failure']}")
            if run.get("grid_error", 0) > LARGEST_GRID_ERROR:
                error = run["grid_error"]
                lines.append(f"{name}, seed {seed}: half the grid is off by up to {error:.2f} nats")
    return "\n".join(lines)


def _mean(name: str, methods: dict[str, Runs], of: Callable[[Runs], dict[str, Tensor]]) -> str:
    """Return a score, the mean over seeds, ± one standard error over images."""
    found = of(methods[name])
    return with_error(torch.stack(list(found.values())).mean(0)) if found else ""


def _number(name: str, methods: dict[str, Runs], key: str, digits: int = 1) -> str:
    return spread(numbers(methods[name], key), digits=digits)


def _train(name: str, methods: dict[str, Runs]) -> str:
    key = next((key for key in TRAIN if len(numbers(methods[name], key))), TRAIN[0])
    return _number(name, methods, key, 2)


def _versus(name: str, methods: dict[str, Runs], key: str) -> str:
    """Return the mean difference to the VAE, its error over images, and its spread over seeds."""
    runs, base = methods[name], best(methods.get(BASELINE, {}))
    own = best(runs) if key == "continuous" else scores(runs, key)
    pairs = [own[seed] - base[seed] for seed in own if seed in base]
    if name == BASELINE or not pairs:
        return ""
    differences = torch.stack(pairs)
    text = with_error(differences.mean(0), sign=True)
    return f"{text} ({differences.mean(1).std().item():.2f})" if len(pairs) > 1 else text


def _ess(name: str, methods: dict[str, Runs]) -> str:
    found, samples = (numbers(methods[name], key) for key in ("ess", "samples"))
    return f"{found.mean():.0f} of {samples.max():.0f}" if len(found) else ""


def scores(runs: Runs, key: str) -> dict[str, Tensor]:
    """Return log p(x) of each test image ``[rows]`` by seed, where it was measured."""
    found = {seed: run.get(key) for seed, run in runs.items()}
    return {seed: torch.tensor(v, dtype=torch.float64) for seed, v in found.items() if v}


def best(runs: Runs) -> dict[str, Tensor]:
    """Return the scores under a continuous prior: by quadrature where that is possible."""
    return scores(runs, "continuous") or scores(runs, "sampled")


def numbers(runs: Runs, key: str) -> Tensor:
    """Return a number of each seed that has it, ``[seeds]``."""
    found = [run[key] for run in runs.values() if key in run]
    return torch.tensor(found, dtype=torch.float64)


COLUMNS: list[tuple[str, Callable[[str, dict[str, Runs]], str]]] = [
    ("test log p, codes", partial(_mean, of=partial(scores, key="codes"))),
    ("vs VAE", partial(_versus, key="codes")),
    ("continuous", partial(_mean, of=best)),
    ("vs VAE", partial(_versus, key="continuous")),
    ("sampled", partial(_mean, of=partial(scores, key="sampled"))),
    ("ESS", _ess),
    ("train log p", _train),
    ("passes/image", partial(_number, key="passes", digits=2)),
    ("seconds", partial(_number, key="seconds")),
    ("processor", partial(_number, key="processor_seconds")),
    ("ms/step", partial(_number, key="ms_per_step")),
]


def plot(pictures: dict[str, Picture], path: Path) -> None:
    """Draw codes by class and samples of every method."""
    with figure(path, 2, len(pictures), 90, figsize=(2.6 * len(pictures), 5.2)) as (_, axes):
        for (above, below), (name, kept) in zip(axes.T, pictures.items(), strict=True):
            codes, labels, samples = kept
            above.scatter(*codes.T.numpy(), c=labels.numpy(), cmap="tab10", s=2, linewidths=0)
            above.set_title(name)
            below.imshow(_tiled(samples).numpy(), cmap="Greys", vmin=0, vmax=1)
            below.set_axis_off()
        axes[0][0].set_ylabel("codes of training images")


def _tiled(images: Tensor) -> Tensor:
    """Return images ``[n * n, side * side]`` as one, ``[n * side, n * side]``."""
    count, side = math.isqrt(len(images)), math.isqrt(images.shape[1])
    tiles = images.reshape(count, count, side, side)
    return tiles.transpose(1, 2).reshape(count * side, count * side)
