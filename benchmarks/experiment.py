"""What the jobs that train share: options, data, evaluation, and results to go on from."""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import write_json
from pyro_recursive import log_marginal
from pyro_recursive.datasets import Dataset, fixed_binarize

EPOCHS = {"digits": 60}  # 8 elsewhere
HELD_OUT = {"digits": 137}  # rows for learning curves and acceptance tests; 400 for larger sets
OPTIMIZER = partial(torch.optim.Adam, lr=1e-3, fused=True)


@dataclass(frozen=True)
class Data:
    """Grey training images, and binary ones to evaluate on, ``[rows, pixels]`` all."""

    train: Tensor
    validation: Tensor
    train_binary: Tensor
    test_binary: Tensor


def held_out(dataset: str) -> int:
    """Return how many training rows are held out."""
    return HELD_OUT.get(dataset, 400)


def sizes(dataset: str) -> dict[str, int]:
    """Return the widths of the networks."""
    small = dataset == "digits"
    return {"hidden": 100 if small else 200, "latent": 10 if small else 50}


def binarized(images: Dataset, rows: int, test_points: int, train_points: int) -> Data:
    """Hold out validation rows, and binarise once all that is evaluated on."""
    split = images.split_validation(rows)
    return Data(
        train=split.train,
        validation=fixed_binarize(split.test, seed=1),
        train_binary=fixed_binarize(split.train[:train_points], seed=2),
        test_binary=fixed_binarize(images.test[:test_points], seed=3),
    )


def parser_of(
    name: str, description: str | None, methods: Iterable[str], more_data: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """Return a parser of the options that all jobs have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    choices = ["digits", "mnist", "fashion_mnist", "omniglot", *more_data]
    parser.add_argument("--dataset", default="digits", choices=choices)
    parser.add_argument("--download", action="store_true", help="fetch a data set that is missing")
    names = list(methods)
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--epochs", type=int, help="default: 60 on digits, 8 elsewhere")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--eval-points", type=int, default=300, help="images to evaluate on")
    parser.add_argument("--eval-samples", type=int, default=5000)
    parser.add_argument("--timing-repeats", type=int, default=9)
    parser.add_argument("--output", help=f"folder; default: runs/{name}-DATASET")
    parser.add_argument("--resume", action="store_true", help="go on after an interrupt")
    parser.add_argument("--smoke", action="store_true", help="seconds: does everything run?")
    return parser


def elbo_of(model: Callable, guide: Callable, batch: Tensor, draws: int) -> Tensor:
    """Return the mean over draws of log p(x, z) - log q(z | x), for each row, in nats."""
    copies = min(draws, 20)
    runs = -(-draws // copies)
    total = torch.zeros(len(batch), dtype=torch.float64)
    for _ in range(runs):
        repeated = batch.repeat(copies, *[1] * (batch.dim() - 1))
        one = log_marginal(model, guide, repeated, num_particles=1)
        total += one.reshape(copies, -1).mean(0)
    return total / runs


def stored(folder: Path, settings: dict[str, Any], resume: bool, key: str) -> dict[str, Any]:
    """Return the results of an interrupted run, if they are of these settings, or none."""
    path = folder / "results.json"
    if resume and path.exists():
        results: dict[str, Any] = json.loads(path.read_text())
        check_settings(path, results["settings"], settings)
        return results
    for checkpoint in folder.glob("*.pt"):  # of a run that is not to be resumed
        checkpoint.unlink()
    fresh: dict[str, Any] = {"settings": settings, key: {}}
    write_json(path, fresh)  # from here on there is something to resume
    return fresh


def check_settings(path: Path, found: dict[str, Any], given: dict[str, Any]) -> None:
    """Exit where stored results have other settings."""
    if found != given:
        raise SystemExit(
            f"{path} holds a run with {found}, not {given}: "
            "give the same options to resume it, or another --output"
        )
