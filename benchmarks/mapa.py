"""MAPA on five curves in the plane, beside the VAE, the IWAE and what MAPA is to come near.

The protocol is ours and frozen. The paper's (arXiv 2403.08941) is unknown but for its outline: the
sizes of networks and data, restarts, learning rates and epochs are not those of its figures.

- 500 points to train on, 500 for validation, 5,000 to test, and noise of a known scale. A draw is a
  data set of its own seed. All methods have the same decoder, 1-50-50-50-2, and encoders of the
  same hidden layers, the same initial decoders, minibatches of 100 and steps of Adam. Of the
  restarts of a draw the one with the best log-likelihood of the validation points is kept.
- The score is the test KL, the mean over test points of log p*(x) - log p(x), both by quadrature.
  MAPA has its recovered prior, the quantile map of its codes (the copula); "KL of codes" is that
  of the mixture over the training codes, without recovery.
- "MAPA S" sums a row's nearest code and draws S of the others, independently: top=1, samples=S. The
  paper's S counts samples and may mean something else. "MAPA-GT 5" draws all from the exact index
  posterior of the current model, made anew every 10 epochs; "MAPA true 5" from that of the true
  decoder at the true latents; "uniform 5" from all codes alike.
- "pooled S" shares draws without replacement among the rows of a minibatch: one code a row summed
  and S drawn, or, for a fraction S, none summed. With 500 points, S of 4 or more is the exact sum.
- All of MAPA starts as an autoencoder, for a tenth of the epochs: from a constant decoder, a sum
  over codes is slow to move. Tables keep 128 neighbours, but for the exact sum.
- Decoder passes count different codes for each point of a minibatch; an IWAE's are its samples.
  "gap" is from the training bound up to the log-likelihood of the same parameters, on the training
  points; for MAPA that under its codes. Seconds are of the fastest restart,
  by the clock and, on a machine that others use as well, of processor time.
"""

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from tqdm import tqdm

from benchmarks.mapa_plots import plot, state_path
from benchmarks.mapa_report import report
from benchmarks.methods.curves import METHODS, learner_of
from benchmarks.methods.mapa import KDE, Cost, Diverged, Learner, Training, train
from benchmarks.report import finish, hardware, write_json
from benchmarks.run import base_parser, parse, stored
from benchmarks.tasks.curves import density_estimate, score, validation
from pyro_recursive.datasets import CURVES, Curve, curve

SEEDS_OF_A_DRAW = 100  # initial networks of one draw are not those of another


@dataclass(frozen=True)
class Settings:
    """Everything that determines a result, beside its draw; a run is resumed with the same."""

    restarts: int
    epochs: int
    rows: int = 500
    validation_rows: int = 500
    test_rows: int = 5000
    batch_size: int = 100
    rate: float = 1e-2
    hidden: int = 50
    bound_repeats: int = 5


@dataclass(frozen=True)
class Block:
    """One draw of one data set, with the methods that are still to run on it."""

    dataset: str
    draw: int
    methods: tuple[str, ...]
    settings: Settings
    folder: Path | None  # for the networks, where they are to be drawn


def main(arguments: list[str]) -> None:
    """Run what is missing, print tables and verdicts, write JSON and pictures."""
    options = parse_options(arguments)
    few = {"rows": 40, "validation_rows": 30, "test_rows": 60, "batch_size": 20, "hidden": 8}
    settings = Settings(options.restarts, options.epochs, **(few if options.smoke else {}))
    folder = Path(options.output)
    results = stored(folder, json.loads(json.dumps(asdict(settings))), options.resume, "draws")
    results["hardware"] = {**hardware(), "threads": 1, "workers": options.workers}
    blocks = _missing(results, options, settings, folder)
    for block, found in tqdm(_all(blocks, options.workers), total=len(blocks), desc="blocks"):
        of_data = results["draws"].setdefault(block.dataset, {})
        of_data.setdefault(str(block.draw), {}).update(found)
        write_json(folder / "results.json", results)
    pictures = plot(results, draw_of(settings), folder)
    finish(results, folder / "results.json", report(results), pictures)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Return the options; a smoke run has its own."""
    parser = base_parser("mapa", __doc__)
    parser.add_argument("--datasets", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--draws", type=int, default=10, help="data sets of each kind")
    parser.add_argument("--restarts", type=int, default=2, help="initial networks of each draw")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed-offset", type=int, default=0, help="the first draw's seed")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--resume", action="store_true", help="go on after an interrupt")
    options = parse(parser, arguments, epochs=2)
    for name in ("draws", "restarts", "epochs", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.smoke:
        options.draws = min(options.draws, 2)
    return options


def draw_of(settings: Settings) -> Callable[..., Curve]:
    """Return the function that draws the data of a name and a ``seed``."""
    return partial(
        curve,
        rows=settings.rows,
        validation_rows=settings.validation_rows,
        test_rows=settings.test_rows,
    )


def _missing(
    results: dict[str, Any], options: argparse.Namespace, settings: Settings, folder: Path
) -> list[Block]:
    """Return what there is to do: draws outermost, so that an interrupted run has whole ones."""
    blocks, draws = [], range(options.seed_offset, options.seed_offset + options.draws)
    for draw in draws:
        for name in options.datasets:
            known = results["draws"].get(name, {}).get(str(draw), {})
            methods = tuple(method for method in options.methods if method not in known)
            if methods:
                keep = folder if draw == draws[0] else None
                blocks.append(Block(name, draw, methods, settings, keep))
    return blocks


def _all(blocks: list[Block], workers: int) -> Iterator[tuple[Block, dict[str, Any]]]:
    """Run blocks, in processes if there are to be several; yield each as it is done."""
    if workers == 1:
        for block in blocks:
            yield block, run(block)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    executor = ProcessPoolExecutor(workers, mp_context=context)
    try:
        futures: dict[Future, Block] = {executor.submit(run, block): block for block in blocks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def run(block: Block) -> dict[str, Any]:
    """Return the scores of the methods of a block."""
    with _one_thread(), pyro.validation_enabled(False):
        data = draw_of(block.settings)(block.dataset, seed=block.draw)
        truth = data.evidence(data.test)
        found = {}
        for name in tqdm(block.methods, desc=f"{block.dataset} {block.draw}", leave=False):
            if name == KDE:
                found[name] = density_estimate(data, truth)
            else:
                found[name] = _of_method(name, data, truth, block)
        return found


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_method(name: str, data: Curve, truth: torch.Tensor, block: Block) -> dict[str, Any]:
    """Train each restart, and evaluate the one that is best on validation on the test points."""
    settings, failures = block.settings, []
    training = Training(settings.epochs, settings.batch_size, settings.rate)
    runs: list[tuple[float, Learner, Cost]] = []
    for restart in range(settings.restarts):
        seed = SEEDS_OF_A_DRAW * block.draw + restart
        try:
            learner = learner_of(name, data, settings.hidden, seed)
            cost = train(learner, training, seed)
            runs.append((validation(learner), learner, cost))
        except Diverged as error:
            failures.append(f"restart {restart}: {error}")
    if not runs:
        return {"failures": failures}
    best, learner, cost = max(runs, key=lambda found: found[0])
    if block.folder is not None:
        path = state_path(block.folder, block.dataset, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        learned = {"encoder": learner.encoder, "decoder": learner.decoder}
        torch.save({part: net.state_dict() for part, net in learned.items()}, path)
    return {
        **score(learner, truth, settings.batch_size, settings.bound_repeats),
        "validation": best,
        "validations": [found[0] for found in runs],
        "passes": cost.passes,
        "seconds": min(found[2].seconds for found in runs),
        "processor_seconds": min(found[2].processor_seconds for found in runs),
        "failures": failures,
    }
