"""Encoders from the start of their latents, and from the output that a new network has.

Every guide is trained on 1,000 rows by the ELBO, four draws a step, in minibatches of 100, with
Adam at 0.005, falling to a fiftieth. The ELBO of a held-out row at the end is compared.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from tqdm import tqdm

from benchmarks.report import Results, finish, table, write_json
from benchmarks.run import base_parser, parse, stored
from benchmarks.tasks.encoded import MODELS, Encoded
from pyro_recursive import MIWAE_ELBO, AmortizedGuide, fit

STARTS = ("the network's own", "moved")


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result."""

    seeds: tuple[int, ...]
    epochs: int | None  # None: those of the model
    rate: float = 0.005
    draws: int = 20


def main(arguments: list[str]) -> None:
    """Train an encoder from both starts on every model with every seed; print a table."""
    parser = base_parser("encoder-starts", __doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: 30, of growth 60")
    parser.add_argument("--resume", action="store_true", help="go on after an interrupt")
    options = parse(parser, arguments, seeds=[0], epochs=1)
    settings = Settings(tuple(options.seeds), options.epochs)
    folder = Path(options.output)
    as_json = asdict(settings) | {"seeds": list(settings.seeds)}
    results = stored(folder, as_json, options.resume, "elbo")
    runs = [(name, start, s) for name in options.models for start in STARTS for s in options.seeds]
    for name, start, seed in tqdm(runs, desc="runs"):
        found = results["elbo"].setdefault(name, {}).setdefault(start, {})
        if str(seed) not in found:
            found[str(seed)] = elbo_after(MODELS[name], start, settings, seed)
            write_json(folder / "results.json", results)
    finish(results, folder / "results.json", report(results))


def elbo_after(task: Encoded, start: str, settings: Settings, seed: int) -> float | None:
    """Train a guide, and return its ELBO of a held-out row in nats; None if it is not finite."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    training, held_out = task.data().chunk(2)
    pyro.set_rng_seed(seed)
    guide = AmortizedGuide(task.model, task.encoder(), inputs=task.inputs)
    guide.train(start == "moved")  # in eval mode an encoder stays as it is
    guide.prepare(training[:100])
    guide.train()
    epochs = settings.epochs or task.epochs
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.02 ** (1 / epochs))
    optimizer = partial(torch.optim.Adam, lr=settings.rate)
    options: dict[str, Any] = {"optimizer": optimizer, "scheduler": decay, "progress": False}
    try:
        fit(
            task.model,
            guide,
            training,
            loss=MIWAE_ELBO(4, 1),
            epochs=epochs,
            batch_size=100,
            **options,
        )
        with torch.no_grad():
            loss = MIWAE_ELBO(settings.draws, 1).loss(task.model, guide, held_out)
    except (ValueError, RuntimeError):  # parameters or gradients that are not finite
        return None
    return -loss / len(held_out) if math.isfinite(loss) else None


def report(results: Results) -> str:
    """Return the ELBO of each seed."""
    rows = [
        [name, *("; ".join(map(_number, found.get(start, {}).values())) for start in STARTS)]
        for name, found in results["elbo"].items()
    ]
    return table(["ELBO of a held-out row, by seed", *STARTS], rows)


def _number(value: float | None) -> str:
    return "failed" if value is None else f"{value:,.0f}" if value < -1000 else f"{value:.2f}"
